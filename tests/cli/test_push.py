"""`distill push` against a local stand-in of the hub's HTTP interface: what it asks for, sends, and keeps to itself."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TOKEN = "hf_secret_of_the_test"
LARGE = ".safetensors"


class Hub(BaseHTTPRequestHandler):
    """Repositories, large files and commits, as far as an upload needs them; see `HubServer` for what it remembers."""

    server: HubServer

    def log_message(self, *_words):
        pass

    def answer(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self):
        self.server.asked.append(f"{self.command} {self.path.split('?')[0]}")
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid user token"}, 401)
        return False

    def do_GET(self):
        if not self.allowed():
            return
        name = self.path.split("?")[0].removeprefix("/api/models/").split("/tree/")[0].split("/revision/")[0]
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            files = repository["files"].items()
            self.answer([{"type": "file", "path": path, "size": len(own), "oid": "0"} for path, own in files])
        else:
            siblings = [{"rfilename": path} for path in repository["files"]]
            self.answer({"id": name, "private": repository["private"], "siblings": siblings, "sha": "a" * 40})

    def do_PUT(self):
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        content = self.body()
        if not self.allowed():
            return
        path, server = self.path.split("?")[0], self.server
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            private = asked.get("private", asked.get("visibility") == "private")
            server.repositories[name] = {"private": private, "files": {}}
            self.answer({"url": f"{server.address}/{name}"})
        elif "/preupload/" in path:
            files = [each["path"] for each in json.loads(content)["files"]]
            modes = [{"path": own, "uploadMode": "lfs" if own.endswith(LARGE) else "regular"} for own in files]
            self.answer({"files": [{**each, "shouldIgnore": False} for each in modes]})
        elif path.endswith("/objects/batch"):
            objects = json.loads(content)["objects"]
            upload = {"upload": {"href": f"{server.address}/upload", "header": {}}}
            self.answer({"objects": [{**each, "actions": upload} for each in objects]})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            self.commit(server.repositories[name]["files"], content)
            self.answer({"commitUrl": f"{server.address}/{name}/commit/b", "commitOid": "b" * 40})
        else:
            self.answer({})

    def commit(self, files, content):
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]


class HubServer(ThreadingHTTPServer):
    """What the stand-in remembers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects, self.asked = {}, {}, []


@pytest.fixture
def hub():
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    files = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "README.md": b"# A model\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def push(hub, *arguments, code=0, token=TOKEN, stdin=subprocess.DEVNULL):
    own = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    command = [sys.executable, "-m", "distill", "push", *map(str, arguments)]
    environment = {name: value for name, value in {**os.environ, **own}.items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=stdin)
    assert done.returncode == code, done.stderr
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done.stderr


def test_a_release_is_sent_whole_to_a_new_private_repository(hub, release):
    said = push(hub, release, "org/model", "--yes")
    assert "a new repository, org/model (private)" in said and "sent:" in said
    sent = hub.repositories["org/model"]
    assert sent["private"] is True
    assert sent["files"] == {file.name: file.read_bytes() for file in release.iterdir()}
    assert all(line.split(",")[0].strip() in sent["files"] for line in said.splitlines() if line.startswith("  "))


def test_nothing_is_sent_where_nobody_can_be_asked(hub, release):
    assert "add --yes" in push(hub, release, "org/model", code=2)
    assert hub.repositories == {} and not any(line.startswith("POST") for line in hub.asked)


def test_an_older_release_is_replaced_and_what_it_had_more_is_removed(hub, release):
    old = {"old.safetensors": b"0", "notes [1].md": b"2", ".gitattributes": b"1"}
    hub.repositories["org/model"] = {"private": True, "files": old}
    said = push(hub, release, "org/model", "--yes")
    assert "old.safetensors is removed" in said and "notes [1].md is removed" in said
    assert {*hub.repositories["org/model"]["files"]} == {*os.listdir(release), ".gitattributes"}
    assert len([line for line in hub.asked if "/commit/" in line]) == 1


def test_what_is_public_is_not_written_to_by_accident(hub, release):
    hub.repositories["org/model"] = {"private": False, "files": {}}
    assert "public already" in push(hub, release, "org/model", "--yes", code=2)
    push(hub, release, "org/model", "--yes", "--public")


def test_a_token_comes_from_the_environment_and_a_wrong_one_is_one_message(hub, release):
    assert "HF_TOKEN is not set" in push(hub, release, "org/model", "--yes", code=2, token=None)
    assert "may not write" in push(hub, release, "org/model", "--yes", code=2, token="hf_other")


@pytest.mark.parametrize("change", ["edit", "add", "link", "remove"])
def test_a_folder_that_is_not_as_released_is_not_sent(hub, release, tmp_path, change):
    (tmp_path / "secret.txt").write_text("private")
    if change == "edit":
        (release / "README.md").write_text("better")
    elif change == "add":
        (release / ".env").write_text("TOKEN=1")
    elif change == "link":
        (release / "notes.txt").symlink_to(tmp_path / "secret.txt")
    else:
        (release / "config.json").unlink()
    assert "not as it was released" in push(hub, release, "org/model", "--yes", code=2)
    assert hub.repositories == {}


def test_a_wrong_name_and_a_folder_without_checksums_are_refused(hub, release, tmp_path):
    push(hub, release, "no name at all", "--yes", code=2)
    assert "no release" in push(hub, tmp_path / "nothing", "org/model", "--yes", code=2)


def test_the_end_of_the_input_is_no_answer(hub, release):
    keyboard, screen = os.openpty()
    os.write(keyboard, b"\x04")  # what Ctrl-D sends
    assert "error: nothing was sent" in push(hub, release, "me/model", code=2, stdin=screen)
    assert not hub.repositories.get("me/model", {}).get("files")
