"""The conversations the bundled model learns from, written for it and generated from templates.

``facts/*.toml`` holds what it should know; ``frames.py`` the ways to ask; ``conversations.py`` and
``data_set.py`` draw seeded conversations from both; ``judge.py`` decides whether an answer is right. This
folder is not part of the installed package.
"""
