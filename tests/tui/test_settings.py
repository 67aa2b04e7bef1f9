"""The settings file: read with care, changed line by line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtx.engine import Generate
from mlxtx.settings import (
    Preset,
    Sampling,
    Settings,
    load_settings,
    parse_value,
    save_setting,
)
from tests.tui.fakes import Script, ask, make_app, screen_text, toasts, wait_until


def test_no_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_settings(tmp_path / "none.toml") == (Settings(), [])


def test_every_wrong_value_is_told_and_skipped_and_the_rest_holds(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        """
        theme = "nord"
        model = 3
        colour = "red"
        model_folders = ["a", 1]
        show_thinking = true
        [sampling]
        temperature = 9
        top_k = 1.5
        top_p = 1
        min_p = true
        [keys]
        "chat.new" = "ctrl+b"
        "chat.stop" = 5
        [presets.pirate]
        system = "Arr"
        temperature = 1.2
        speed = 3
        [presets]
        odd = 1
        """.replace("[presets]\n        odd = 1", "")
    )
    settings, problems = load_settings(path)
    assert settings.theme == "nord" and settings.show_thinking and settings.model == "bundled"
    assert settings.sampling == Sampling(top_p=1.0)
    assert settings.keys == {"chat.new": "ctrl+b"}
    assert settings.presets == {"pirate": Preset("Arr", {"temperature": 1.2})}
    assert sorted(line.split(" ")[0] for line in problems) == [
        "colour", "keys.chat.stop", "model", "model_folders", "presets.pirate.speed",
        "sampling.min_p", "sampling.temperature", "sampling.top_k",
    ]  # fmt: skip
    assert "sampling.temperature must be at most 5; it was skipped" in problems
    assert "model must be a string; it was skipped" in problems


@pytest.mark.parametrize("data", [b"theme = ", b"\xff\xfe", b"a = 1\na = 2", b"sampling = 3\n"])
def test_a_broken_file_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(data)
    settings, problems = load_settings(path)
    assert settings == Settings() and len(problems) == 1


def test_saving_leaves_every_other_line_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    text = '# mine\ntheme = "nord"  # calm\n\n[sampling]\n# hot\ntemperature = 1.5\n\n[keys]\n'
    path.write_text(text)
    save_setting("sampling", "temperature", 0.2, path)
    save_setting("sampling", "top_k", 40, path)
    save_setting("", "model", 'a "b" \\ c', path)
    save_setting("keys", "chat.new", "ctrl+b", path)
    assert path.read_text() == (
        '# mine\ntheme = "nord"  # calm\nmodel = "a \\"b\\" \\\\ c"\n\n[sampling]\n# hot\n'
        'temperature = 0.2\ntop_k = 40\n\n[keys]\n"chat.new" = "ctrl+b"\n'
    )
    save_setting("sampling", "top_k", None, path)
    assert "top_k" not in path.read_text()


@pytest.mark.parametrize("header", ["[sampling] # warm", "[ sampling ]", '["sampling"]'])
def test_saving_under_a_header_written_in_another_way(tmp_path: Path, header: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"# mine\u2028still mine\n{header}\ntop_k = 3\n")
    save_setting("sampling", "temperature", 0.5, path)
    assert path.read_text() == (f"# mine\u2028still mine\n{header}\ntop_k = 3\ntemperature = 0.5\n")


def test_saving_a_preset_leaves_every_other_line(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("# mine\n[presets.pirate]\nsystem = 'Arr.'\n")
    save_setting("presets", "brief", {"system": "Short.\n", "top_k": 4}, path)
    assert path.read_text().startswith("# mine\n[presets.pirate]\nsystem = 'Arr.'\n")
    assert load_settings(path)[0].presets == {
        "pirate": Preset("Arr."),
        "brief": Preset("Short.\n", {"top_k": 4}),
    }


@pytest.mark.parametrize(
    ("text", "change", "result"),
    [
        (
            '# mine\ntheme = "a#b"  # calm "x" # y\n',
            ("", "theme", "nord"),
            '# mine\ntheme = "nord"  # calm "x" # y\n',
        ),
        (
            '# mine\nmodel_folders = [\n  "a", # one\n  "b",\n] # both\nkv = "" # none\n',
            ("", "model_folders", ["c"]),
            '# mine\nmodel_folders = ["c"] # both\nkv = "" # none\n',
        ),
        (
            '# mine\nsystem = """\nkv = 5\n[x]\n"""\nkv = "" # none\n',
            ("", "kv", "k8v4g64"),
            '# mine\nsystem = """\nkv = 5\n[x]\n"""\nkv = "k8v4g64" # none\n',
        ),
        (
            '# mine\n[presets.a]\nsystem = "x" # short\nmin_p = 0.1\n# end\n[keys] # none\n',
            ("presets", "a", {"system": "y", "top_k": 3}),
            '# mine\n[presets.a]\nsystem = "y" # short\n# end\ntop_k = 3\n[keys] # none\n',
        ),
    ],
)
def test_saving_leaves_comments(
    tmp_path: Path, text: str, change: tuple[str, str, Any], result: str
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    save_setting(*change, path)
    assert path.read_text() == result


def test_nothing_of_a_file_written_afresh_is_lost(tmp_path: Path) -> None:
    """Values of kinds that no setting has are kept as they are."""
    path = tmp_path / "settings.toml"
    text = "sampling.top_k = 3\nborn = 2020-01-02\nat = 2020-01-02T10:00:00Z\nt = 10:00:00\n"
    text += "[[extra]]\na = {b = 1, 'c d' = [1.5]}\n"
    path.write_text(text)
    save_setting("sampling", "temperature", 0.5, path)
    wanted = tomllib.loads(text)
    wanted["sampling"]["temperature"] = 0.5
    assert tomllib.loads(path.read_text()) == wanted


def test_settings_saved_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "settings.toml"
    names = [f"action{number}" for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: save_setting("keys", name, "f9", path), names))
    assert load_settings(path)[0].keys == dict.fromkeys(names, "f9")


def test_a_link_to_the_settings_stays_a_link(tmp_path: Path) -> None:
    path, real = tmp_path / "settings.toml", tmp_path / "dotfiles.toml"
    real.write_text("plain = true\n")
    path.symlink_to(real)
    save_setting("", "theme", "nord", path)
    assert path.is_symlink()
    assert tomllib.loads(real.read_text()) == {"plain": True, "theme": "nord"}


def test_saving_in_a_layout_the_editor_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('sampling.temperature = 1.0\nkeys = {"chat.new" = "f9"}\n')
    save_setting("sampling", "top_k", 5, path)
    assert tomllib.loads(path.read_text()) == {
        "sampling": {"temperature": 1.0, "top_k": 5},
        "keys": {"chat.new": "f9"},
    }


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes('# mine\r\ntheme = "nord"\r\n'.encode("utf-8-sig"))
    assert load_settings(path) == (Settings(theme="nord"), [])
    save_setting("", "plain", True, path)
    assert path.read_text() == '# mine\ntheme = "nord"\nplain = true\n'


def test_saving_over_a_broken_file_keeps_it_beside(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("theme = ")
    save_setting("", "theme", "nord", path)
    assert load_settings(path)[0].theme == "nord"
    assert (tmp_path / "settings.toml.broken").read_text() == "theme = "


def test_a_preset_is_saved_as_its_own_table(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    save_setting("presets", "two words", {"system": "x\ny", "temperature": 0.5}, path)
    assert load_settings(path)[0].presets == {"two words": Preset("x\ny", {"temperature": 0.5})}


values = st.one_of(
    st.text(), st.booleans(), st.integers(-(2**62), 2**62), st.lists(st.text(), max_size=3),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
names = st.text(min_size=1, max_size=12)


@hypothesis.settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "sampling", "a b"]), names, values), max_size=12))
def test_any_sequence_of_saves_reads_back(steps: list[tuple[str, str, object]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.toml"
        wanted: dict[str, object] = {}
        for table, name, value in steps:
            if not table and name in ("sampling", "a b"):
                continue
            save_setting(table, name, value, path)
            place = wanted.setdefault(table, {}) if table else wanted
            assert isinstance(place, dict)
            place[name] = value
        if path.exists():
            assert tomllib.loads(path.read_text("utf-8")) == wanted


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", " 7 ", 7),
        ("temperature", "hot", "temperature must be a number"),
        ("top_k", "1.5", "top_k must be a whole number"),
        ("top_p", "2", "top_p must be at most 1"),
        ("top_p", "nan", "top_p must be at least 1e-06"),
        ("heat", "1", "heat is no setting; there are temperature"),
        ("", "", "that is no setting"),
    ],
)
def test_typed_values(name: str, text: str, result: object) -> None:
    if isinstance(result, str):
        with pytest.raises(ValueError, match=result):
            parse_value(Sampling, name, text)
    else:
        assert parse_value(Sampling, name, text) == result
    assert parse_value(Settings, "model_folders", "a, b,") == ["a", "b"]
    assert parse_value(Settings, "plain", "Yes") is True


async def test_broken_settings_are_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('theme = "nope"\nx = 1\n[keys]\n"chat.fly" = "f9"\n')
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: toasts(app))
        assert app.theme == "mlxtx-dark"
        text = "\n".join(toasts(app))
        assert "no theme nope" in text and "x is no setting" in text
        assert "keys.chat.fly names no action" in text


async def test_the_key_map_of_the_settings_holds(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[keys]\n"app.settings" = "ctrl+b"\n')
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await pilot.press("ctrl+b")
        await wait_until(pilot, lambda: "show_thinking" in screen_text(app))


async def test_a_setting_is_changed_on_its_screen_and_in_the_file(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f6")
        await wait_until(pilot, lambda: "sampling.top_k" in screen_text(app))
        await pilot.press(*["down"] * 5, "enter")
        assert app.settings.show_thinking
        await pilot.press("end", "enter")
        await wait_until(pilot, lambda: "the same seed" in screen_text(app))
        await pilot.press("backspace", "backspace", *"x7", "enter")
        assert any("seed must be a whole number" in toast for toast in toasts(app))
        await pilot.press("enter")
        await pilot.press("backspace", "backspace", "7", "enter")
        await wait_until(pilot, lambda: app.settings.sampling.seed == 7)
        await pilot.press("delete")
        await wait_until(pilot, lambda: app.settings.sampling.seed == -1)
    assert tomllib.loads((tmp_path / "settings.toml").read_text()) == {
        "show_thinking": True, "sampling": {},
    }  # fmt: skip


async def test_a_value_in_the_file_goes_before_the_models_though_it_is_ours_too(
    tmp_path: Path,
) -> None:
    usual = Sampling().temperature
    (tmp_path / "settings.toml").write_text(f"[sampling]\ntemperature = {usual}\n")
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        await pilot.pause()
        app.model.sampling = {"temperature": 0.1, "top_p": 0.2}
        assert (app.chat.sampling["temperature"], app.chat.sampling["top_p"]) == (usual, 0.2)
        app.change_setting("sampling", "top_p", Sampling().top_p)
        app.change_setting("sampling", "temperature", usual, forget=True)
        assert app.chat.sampling["temperature"] == 0.1
        assert app.chat.sampling["top_p"] == Sampling().top_p


async def test_the_theme_is_kept(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test() as pilot:
        app.chat.composer.fill("/theme nord")
        await pilot.press("enter")
        await wait_until(pilot, lambda: app.theme == "nord")
        app.chat.composer.fill("/theme none-such")
        await pilot.press("enter")
        assert any("mlxtx-light" in toast for toast in toasts(app))
    assert load_settings(tmp_path / "settings.toml")[0].theme == "nord"


async def test_presets_and_sampling_hold_for_the_chat(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('[presets.pirate]\nsystem = "Arr"\ntop_k = 3\n')
    script = Script()
    app = make_app(tmp_path, script)
    async with app.run_test(size=(100, 30)) as pilot:
        for command in ("/preset pirate", "/set temperature 0", "/set top_k x", "/preset none"):
            app.chat.composer.fill(command)
            await pilot.press("enter")
        assert any("top_k must be a whole number" in toast for toast in toasts(app))
        assert any(toast == "Presets: pirate" for toast in toasts(app))
        await ask(pilot, "hi")
        job = script.submitted(Generate)[0]
        assert job.messages[0] == {"role": "system", "content": "Arr"}
        assert job.options["top_k"] == 3 and job.options["temperature"] == 0
        # The panel shows the same values, takes right ones and leaves wrong ones.
        await pilot.press("ctrl+s")
        await wait_until(pilot, lambda: "Arr" in screen_text(app))
        await pilot.press("tab", "backspace", *"1.5", "tab", *"oops", "escape")
        assert app.chat.sampling["temperature"] == 1.5
        assert app.chat.sampling["top_p"] == 0.95
        again = app.store.chat(1)
        assert again is not None and again.settings["system"] == "Arr"


async def test_the_models_own_sampling_gives_way_to_what_was_chosen(tmp_path: Path) -> None:
    from mlxtx.events import Done, Loaded

    def load(job: object) -> list[object]:
        sampling = {"temperature": 0.0, "top_k": 20, "top_p": 0.8}
        loaded = Loaded(model="m", seconds=0.1, bytes=1, details={"sampling": sampling})
        return [loaded, Done(reason="done")]

    (tmp_path / "settings.toml").write_text("[sampling]\ntop_k = 7\n")
    app = make_app(tmp_path, Script(Load=load))
    async with app.run_test() as pilot:
        await wait_until(pilot, lambda: app.model.state == "ready")
        app.chat.composer.fill("/set top_p 0.5")
        await pilot.press("enter")
        found = app.chat.sampling
        assert (found["temperature"], found["top_k"], found["top_p"]) == (0.0, 7, 0.5)
        assert found["max_tokens"] == 2048


async def test_a_preset_can_be_saved_from_the_panel(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("ctrl+s")
        await pilot.press(*"Be brief", "ctrl+s", *"brief", "enter")
        await wait_until(pilot, lambda: "brief" in app.settings.presets)
        await pilot.press("escape")
    saved = load_settings(tmp_path / "settings.toml")[0].presets["brief"]
    assert saved.system == "Be brief" and saved.sampling["top_p"] == 0.95


async def test_large_numbers_are_shown_as_they_are_typed(tmp_path: Path) -> None:
    app = make_app(tmp_path, Script())
    async with app.run_test(size=(100, 40)) as pilot:
        await pilot.pause()
        app.chat.change_sampling({"seed": 20261122})
        await pilot.press("ctrl+s")
        await pilot.pause()
        field = app.screen.query_one("#seed")
        assert field.value == "20261122" and not field.has_class("-wrong")
