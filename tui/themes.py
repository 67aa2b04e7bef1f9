"""The app's own colours, one dark and one light: quiet greys, one accent."""

from __future__ import annotations

from textual.theme import Theme

THEMES = (
    Theme(
        name="mlxtx-dark",
        primary="#8fb4d9",
        secondary="#9aa7b5",
        accent="#c9b38c",
        success="#93b88f",
        warning="#d6a96a",
        error="#d98787",
        foreground="#d5d8dc",
        background="#16181b",
        surface="#1d2024",
        panel="#262a2f",
        dark=True,
        variables={
            "border": "#8fb4d9 40%",
            "border-blurred": "#33383f",
            "footer-key-foreground": "#8fb4d9",
            "input-selection-background": "#8fb4d9 30%",
            "block-cursor-background": "#2c3b4a",
            "block-cursor-foreground": "#e6e9ec",
            "block-cursor-text-style": "none",
            "block-cursor-blurred-background": "#262a2f",
        },
    ),
    Theme(
        name="mlxtx-light",
        primary="#2f6496",
        secondary="#66707a",
        accent="#8a6a2f",
        success="#3f7a3a",
        warning="#a3661a",
        error="#b04646",
        foreground="#24282d",
        background="#fafaf8",
        surface="#f1f1ee",
        panel="#e6e6e2",
        dark=False,
        variables={
            "border": "#2f6496 50%",
            "border-blurred": "#d3d3cd",
            "footer-key-foreground": "#2f6496",
            "input-selection-background": "#2f6496 25%",
            "block-cursor-background": "#d5e2ee",
            "block-cursor-foreground": "#1b1f23",
            "block-cursor-text-style": "none",
            "block-cursor-blurred-background": "#e6e6e2",
        },
    ),
)
