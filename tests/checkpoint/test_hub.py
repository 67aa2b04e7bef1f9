"""Downloads against a server that speaks the Hub's API, in a process that knows no other Hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlxtx.checkpoint.hub import resolve
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import write_llama
from tests.checkpoint.hub_server import Hub

WANTED = ["NOTICE", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]

UPLOAD = """
import sys
from mlxtx.checkpoint.upload import upload
from mlxtx.errors import MlxtxError
try:
    print("RESULT", upload(sys.argv[1], sys.argv[2], private=len(sys.argv) > 3))
except MlxtxError as error:
    print("ERROR", error)
"""

SCRIPT = """
import json, sys
from mlxtx.checkpoint.hub import resolve
from mlxtx.errors import MlxtxError
for arguments in json.loads(sys.argv[1]):
    events = []
    try:
        folder = resolve(*arguments, on_event=events.append)
        found = {"files": sorted(p.name for p in folder.iterdir()), "folder": str(folder)}
        found["progress"] = [(e.stage, e.done, e.total, e.unit) for e in events][-1:]
    except MlxtxError as error:
        found = {"error": str(error)}
    print("RESULT", json.dumps(found))
"""


def alone(home, endpoint, **environment):
    """The environment of a process that knows no Hub but ``endpoint`` and no cache but ``home``."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    return variables | {"HF_HUB_DISABLE_TELEMETRY": "1", **environment}


def python(home, endpoint, script, *arguments, **environment):
    """What a fresh process with only this Hub says."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=alone(home, endpoint, **environment),
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def ask(home, endpoint, *calls, **environment):
    """What ``resolve`` says to each call."""
    out, noise = python(home, endpoint, SCRIPT, json.dumps(calls), **environment)
    lines = out.splitlines()
    assert all(line.startswith("RESULT ") for line in lines), "the library printed something"
    return [json.loads(line.removeprefix("RESULT ")) for line in lines], noise


@pytest.fixture
def files(tmp_path):
    write_llama(tmp_path / "source", dtype="BF16")
    names = ("config.json", "model.safetensors")
    files = {name: (tmp_path / "source" / name).read_bytes() for name in names}
    return files | {
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
        "NOTICE": b"to be passed on",
        "modeling.py": b"raise SystemExit(3)",
        "pytorch_model.bin": b"pickle",
        "original/model.safetensors": b"once more",
        "consolidated.safetensors": b"once more",
    }


def test_download_resume_revision_and_offline_use(tmp_path, files):
    # Large enough to be cut behind the first of the 10 MB pieces that huggingface-hub takes.
    files |= {"model.safetensors": bytes(range(256)) * 100_000}
    older = files | {"config.json": b"{}"}
    hub = Hub({"owner/tiny": {"main": files, "v1": older}}, cut={"model.safetensors"})
    home = tmp_path / "home"
    with hub.serving():
        (new, old, gone), noise = ask(
            home, hub.url, ["owner/tiny"], ["owner/tiny", "v1"], ["owner/tiny", "v2"]
        )
    assert new["files"] == old["files"] == WANTED
    total = sum(len(files[name]) for name in WANTED)
    assert new["progress"] == [["download", total, total, "bytes"]]
    assert noise == "", "no bar and no warning of its own"
    # The connection was cut in the middle, and the rest was asked for from there.
    assert hub.ranges == [f"bytes={10 << 20}-"]
    with open(f"{new['folder']}/model.safetensors", "rb") as file:
        assert file.read() == files["model.safetensors"]
    with open(f"{old['folder']}/config.json", "rb") as file:
        assert file.read() == b"{}"
    assert gone["error"] == "owner/tiny has no revision v2; see its page for branches"
    # The server is gone: what is there is used, what is not is one clear line.
    (again, other), _ = ask(home, hub.url, ["owner/tiny"], ["owner/other"])
    assert again["folder"] == new["folder"]
    assert (
        "cannot be reached and owner/other is not completely in the local cache" in other["error"]
    )
    (offline, none), _ = ask(
        home, "http://127.0.0.1:9", ["owner/tiny", "v1"], ["owner/other"], HF_HUB_OFFLINE="1"
    )
    assert offline["folder"] == old["folder"]
    assert "HF_HUB_OFFLINE" in none["error"]


PLAN = """
import sys
from mlxtx.diagnostics.facts import read_facts
print("RESULT", read_facts(sys.argv[1]).weights)
"""


def test_a_part_in_the_cache_is_no_repository_without_weights(tmp_path, files):
    """The memory plan fetches config.json alone: without a network that is not the model."""
    hub = Hub({"owner/tiny": {"main": files}})
    with hub.serving():
        assert "RESULT" in python(tmp_path, hub.url, PLAN, "owner/tiny")[0]
    (gone,), _ = ask(tmp_path, hub.url, ["owner/tiny"])
    (offline,), _ = ask(tmp_path, hub.url, ["owner/tiny"], HF_HUB_OFFLINE="1")
    for found in (gone, offline):
        assert "owner/tiny is not completely in the local cache" in found["error"]


def test_a_plan_needs_no_network_where_all_is_in_the_cache(tmp_path, files):
    hub = Hub({"owner/tiny": {"main": files}})
    with hub.serving():
        ask(tmp_path, hub.url, ["owner/tiny"])
        online, _ = python(tmp_path, hub.url, PLAN, "owner/tiny")
    gone, _ = python(tmp_path, hub.url, PLAN, "owner/tiny")
    offline, _ = python(tmp_path, hub.url, PLAN, "owner/tiny", HF_HUB_OFFLINE="1")
    assert online == gone == offline != ""


OTHER = """
import sys
from huggingface_hub import snapshot_download
patterns = ["*.json", "*.safetensors", "*.jinja"]
snapshot_download(sys.argv[1], allow_patterns=patterns, ignore_patterns=["*/*", "consol*", "ad*"])
"""


def test_a_licence_that_another_program_did_not_fetch_is_not_missed(tmp_path, files):
    """What the model runs with is in the cache: that is enough where there is no network."""
    hub = Hub({"owner/tiny": {"main": files}})
    with hub.serving():
        python(tmp_path, hub.url, OTHER, "owner/tiny")
        online, _ = python(tmp_path, hub.url, PLAN, "owner/tiny")
    (gone,), _ = ask(tmp_path, hub.url, ["owner/tiny"])
    (offline,), _ = ask(tmp_path, hub.url, ["owner/tiny"], HF_HUB_OFFLINE="1")
    for found in (gone, offline):
        assert found.get("files") == WANTED[1:], found
    assert python(tmp_path, hub.url, PLAN, "owner/tiny", HF_HUB_OFFLINE="1")[0] == online != ""


def test_a_token_that_is_no_longer_good(tmp_path, files):
    hub = Hub({"owner/tiny": {"main": files}}, expired="hf_old")
    with hub.serving():
        (refused,), _ = ask(tmp_path, hub.url, ["owner/tiny"], HF_TOKEN="hf_old")
    assert "the Hub refuses owner/tiny (401)" in refused["error"]
    assert "hf auth login" in refused["error"]


def test_ctrl_c_ends_a_download_at_its_next_piece(tmp_path, files):
    """The server holds a file in its middle: Ctrl-C comes then, and the rest only afterwards."""
    files |= {"model.safetensors": bytes(40 << 20)}
    hub = Hub({"owner/tiny": {"main": files}}, held={"model.safetensors"})
    with hub.serving():
        command = [sys.executable, "-m", "mlxtx", "generate", "-m", "owner/tiny", "-p", "x"]
        environment = alone(tmp_path, hub.url, HF_HUB_DOWNLOAD_TIMEOUT="60")
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
            while "model.safetensors" not in hub.asked:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read(1) == b"\n"  # said at once
            hub.release.set()
            assert (process.wait(60), process.stderr.read()) == (130, b"")
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


def test_repositories_that_cannot_be_read(tmp_path, files):
    pickled = {name: files[name] for name in ("config.json", "pytorch_model.bin")}
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"small"}
    hub = Hub(
        {
            "owner/gated": {"main": files},
            "owner/old": {"main": pickled},
            "owner/lora": {"main": adapter},
        },
        gated={"owner/gated"},
    )
    names = ("owner/gated", "owner/unknown", "owner/old", "owner/lora")
    with hub.serving():
        (gated, unknown, old, lora), _ = ask(tmp_path, hub.url, *[[name] for name in names])
    assert "owner/lora holds an adapter, not a model" in lora["error"]
    assert "owner/old has no safetensors weights" in old["error"]
    assert "owner/gated is gated: accept its terms" in gated["error"]
    assert "hf auth login" in gated["error"]
    assert "the Hub has no owner/unknown that you can read" in unknown["error"]


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/x", "a/b/c", "owner/name with space"])
def test_what_can_only_be_a_path_asks_no_hub(name):
    with pytest.raises(MlxtxError, match="there is no folder"):
        resolve(name)


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path


def test_only_a_repository_has_revisions(tmp_path):
    for name in (str(tmp_path), "bundled"):
        with pytest.raises(MlxtxError, match=f"{name} has no revisions.* leave out 'v1'"):
            resolve(name, "v1")


@pytest.mark.parametrize("name", ["", "~nobody that is known/x", "x" * 5000, "a\0b"])
def test_a_name_that_cannot_be_is_one_line(name):
    with pytest.raises(MlxtxError, match="Hub id"):
        resolve(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])
def test_a_folder_without_permission(mode, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir(mode=mode)
    with pytest.raises(MlxtxError, match=r"cannot read the folder .*: Permission denied"):
        resolve(folder)


def test_upload_sends_every_file(tmp_path):
    folder = tmp_path / "model"
    write_llama(folder, dtype="BF16")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub = Hub({})
    with hub.serving():
        out, _ = python(
            tmp_path / "home", hub.url, UPLOAD, str(folder), "owner/mine", HF_TOKEN="hf_test"
        )
        assert f"RESULT {hub.url}/owner/mine" in out
        no_account, _ = python(tmp_path / "home", hub.url, UPLOAD, str(folder), "owner/mine")
        stranger, _ = python(
            tmp_path / "home", hub.url, UPLOAD, str(tmp_path), "owner/mine", HF_TOKEN="hf_test"
        )
        hub.repos["owner/seen"] = {"main": {}}
        public, _ = python(
            tmp_path / "home", hub.url, UPLOAD, str(folder), "owner/seen", "x", HF_TOKEN="hf_test"
        )
    assert "owner/seen is public already" in public and not hub.uploads["owner/seen"]
    sent = hub.uploads["owner/mine"]
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "hf auth login" in no_account
    assert "is no model's folder" in stranger
