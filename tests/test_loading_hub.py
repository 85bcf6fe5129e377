"""Models of the hub: what is asked of it, what is taken from the cache, and one clear line where it says no."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

import simsd
from simsd import SimsdError
from small_checkpoints import MASK_ID, write_checkpoint, write_tokenizer

COMMIT, OLDER = "a" * 40, "b" * 40
COMMITS = {"main": COMMIT, "v1": OLDER}
PICKLE = b"\x80\x04."


@pytest.fixture
def published(tmp_path):
    """A checkpoint as it is published: with code that nobody should run, and weights of another format beside."""
    folder = tmp_path / "published"
    write_checkpoint(folder, shard="20KB", extra={"mask_token_id": MASK_ID, "block_length": 8})
    write_tokenizer(folder)
    (folder / "modeling_sdar.py").write_text("raise SystemExit('remote code was run')")
    (folder / "configuration_sdar.py").write_text("raise SystemExit('remote code was run')")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, published, cache):
    """A hub on loopback with the repository people/model; `hub.asked`: the paths and tokens of its requests."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked, server.refusal = published, [], None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def place_hub(monkeypatch, address: str) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as a download takes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((path, self.headers.get("Authorization")))
        if hub.refusal is not None:
            status, code, message = hub.refusal
            return self.answer(status, X_Error_Code=code, X_Error_Message=message)
        files = [file for file in hub.folder.iterdir() if file.is_file()]
        if path.startswith("/api/models/people/model/tree/"):
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in files]
            return self.answer(200, json.dumps(listed).encode())
        if path.startswith("/api/models/"):
            revision = path.removeprefix("/api/models/people/model").removeprefix("/revision/") or "main"
            if revision not in COMMITS:
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            told = {"id": "people/model", "sha": COMMITS[revision], "siblings": [{"rfilename": f.name} for f in files]}
            return self.answer(200, json.dumps(told).encode())
        commit, _, name = path.removeprefix("/people/model/resolve/").partition("/")
        file = hub.folder / name
        return self.answer(200, file.read_bytes(), ETag=f'"{digest(file)}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def put_in_cache(published: Path, cache: Path, commit: str = COMMIT, branch: str = "main") -> None:
    """As a download leaves it, for `people/model`."""
    place = cache / "models--people--model"
    shutil.copytree(published, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(commit)


def refusal(source, **arguments) -> str:
    with pytest.raises(SimsdError) as error:
        simsd.load(source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hub_id_is_downloaded_once_without_code_and_pickles(hub, cache):
    loaded = simsd.load("people/model")
    assert (loaded.name, loaded.block_length, loaded.tokenizer is None) == ("people/model", 8, False)
    fetched = {path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".py", ".bin"))]
    before = [path for path, _ in hub.asked if "/resolve/" in path]
    simsd.load("people/model")
    assert [path for path, _ in hub.asked if "/resolve/" in path] == before
    assert [path.name for path in (cache / "models--people--model" / "snapshots").iterdir()] == [COMMIT]


def test_revision_token_and_cache_folder_are_the_callers(hub, tmp_path, cache):
    simsd.load("people/model", revision="v1", token="hf_mine", cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "models--people--model" / "snapshots" / OLDER / "config.json").exists()
    assert not cache.exists()
    assert {token for _, token in hub.asked} == {"Bearer hf_mine"}


def test_local_files_only_takes_the_cache_and_asks_nobody(hub, published, cache):
    put_in_cache(published, cache)
    assert simsd.load("people/model", local_files_only=True).name == "people/model"
    line = refusal("people/model", local_files_only=True, revision="v1")
    assert "revision 'v1' is not whole in the cache, and local_files_only=True forbids a download" in line
    assert hub.asked == []


def test_hf_hub_offline_is_honoured(hub, published, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "it is not whole in the cache, and HF_HUB_OFFLINE forbids a download" in refusal("people/model")
    put_in_cache(published, cache)
    assert simsd.load("people/model").name == "people/model"
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_said_so(hub, monkeypatch):
    place_hub(monkeypatch, "http://127.0.0.1:9")  # where nobody listens
    assert "'people/model' is no local folder and cannot be had from the hub: " in refusal("people/model")


REFUSALS = {
    "gated": ((403, "GatedRepo", "Access to model people/model is restricted"), "is gated: accept its terms at https:"),
    "gated_without_login": ((401, "GatedRepo", "Please log in"), "is gated: accept its terms at https:"),
    "private_or_missing": ((401, "RepoNotFound", "Invalid username or password."), "if it is private, log in"),
    "missing": ((404, "RepoNotFound", "Repository not found"), "has no such repository or does not show it"),
    "forbidden": ((403, "", "Forbidden"), "cannot be had from the hub: "),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_says_what_to_do(hub, case):
    hub.refusal, message = REFUSALS[case]
    line = refusal("people/model")
    assert message in line and "'people/model'" in line


def test_a_revision_that_there_is_not_is_named(hub):
    assert "'people/model' has no revision 'v9': give a branch, a tag or a commit" in refusal(
        "people/model", revision="v9"
    )


def test_a_revision_of_what_is_not_on_the_hub_is_refused(published):
    assert "revision='main' is for hub ids" in refusal(published, revision="main")
    assert "revision='main' is for hub ids" in refusal("tiny-target", revision="main")
    assert "revision='main' is for hub ids, got a module" in refusal(simsd.load(published).model, revision="main")


@pytest.mark.parametrize("source", ["people/", "a b/c", "../people/model/x", "people/model/main"])
def test_what_is_no_hub_id_is_refused_in_one_line(hub, source):
    assert repr(source) in refusal(source)


def test_code_in_the_folder_is_never_imported(published):
    assert json.loads((published / "config.json").read_text())["auto_map"]
    assert simsd.load(published).block_length == 8


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_weights_that_could_run_code_are_refused_with_a_way_to_convert_them(published, name):
    for file in (*published.glob("*.safetensors*"), published / "pytorch_model.bin"):
        file.unlink()
    (published / name).write_bytes(PICKLE)
    line = refusal(published)
    assert f"has its weights in {name}, whose format can run code" in line
    assert "from_pretrained(...).save_pretrained(...)" in line
