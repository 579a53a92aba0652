"""Model look-up: folders, the hub cache offline, and a local server that answers like the hub.

No test uses an outside network.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlx_posttrain.convert import gpt2, hub
from mlx_posttrain.errors import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "gpt2"}'
WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file without tensors
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}

# huggingface_hub reads its settings when imported, so every case runs in its own process.
SCRIPT = """
import json, sys
from mlx_posttrain.convert.hub import resolve
from mlx_posttrain.errors import UserError
for name in sys.argv[1:]:
    name, _, kind = name.partition("#")
    try:
        print(json.dumps(str(resolve(name, kind or "model"))))
    except UserError as error:
        print(json.dumps("error: " + str(error)))
"""


def run(names, tmp_path, **settings):
    """Resolve names in a fresh process whose hub cache is tmp_path/hub.

    Returns (the folders or 'error: ...' lines, stderr).
    """
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    env |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        **settings,
    }
    env = {key: value for key, value in env.items() if value is not None}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(names) and all("\n" not in answer for answer in answers)
    return answers, done.stderr


def cache(tmp_path, name, files=FILES):
    """Write files into tmp_path/hub as huggingface_hub does: blobs, and a snapshot of links to them."""
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    for sub in ("refs", "blobs", f"snapshots/{SHA}"):
        (repo / sub).mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    for file, data in files.items():
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (repo / "snapshots" / SHA / file).symlink_to(os.path.relpath(blob, repo / "snapshots" / SHA))
    return repo / "snapshots" / SHA


def folder(path, files=FILES):
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def without(*names):
    return {name: data for name, data in FILES.items() if name not in names}


# Folders


def test_a_folder_is_returned_unchanged(tmp_path, monkeypatch):
    where = folder(tmp_path / "model")
    assert hub.resolve(str(where)) == where and hub.resolve(where) == where
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("model") == Path("model") and hub.resolve("./model/") == Path("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/model") == where


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no config.json; give a folder in Hugging Face's format"),
        (
            {"adapter_config.json": b"{}"},
            r"adapter_config.json but no config.json: it holds a PEFT adapter, "
            r"not a model; give the model",
        ),
        ({"config.json": CONFIG}, r"has no model.safetensors; only safetensors weights load"),
        (
            {"config.json": CONFIG, "pytorch_model.bin": b"x"},
            r"no model.safetensors; pytorch_model.bin is refused, as loading pickle files can run code: "
            r"only safetensors load",
        ),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'},
            r"has no usable weight_map",
        ),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": b"{"},
            r"index.json is not valid JSON: .* "
            r"at line 1, column 2",
        ),
    ],
)
def test_folders_that_hold_no_model(tmp_path, files, message):
    where = folder(tmp_path / "model", files)
    with pytest.raises(UserError, match=message):
        hub.resolve(str(where))


def test_adapter_folders(tmp_path):
    where = folder(tmp_path / "a", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS})
    assert hub.resolve(str(where), kind="adapter") == where
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; adapter_model.bin is refused"):
        hub.resolve(
            str(folder(tmp_path / "b", {"adapter_config.json": b"{}", "adapter_model.bin": b""})),
            kind="adapter",
        )
    with pytest.raises(
        UserError,
        match=r"config.json but no adapter_config.json: it holds a model, not a "
        r"PEFT adapter",
    ):
        hub.resolve(str(folder(tmp_path / "c")), kind="adapter")


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "../nowhere",
        "/no/where",
        "~/nowhere-at-all",
        "runs/sft/final",
        "runs/",
        "a\\b",
        "m.safetensors",
    ],
)
def test_a_path_that_does_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the demo may have left a folder runs/ in the project's folder
    with pytest.raises(
        UserError,
        match=r"does not exist; give an existing folder or a hub id such as "
        r"openai-community/gpt2",
    ):
        hub.resolve(name)


def test_a_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the folder gpt2 does not exist"):
        hub.resolve(Path("gpt2"))


def test_unusable_names(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no model given; give a folder, a hub id such as "
        r"openai-community/gpt2, or tiny",
    ):
        hub.resolve("  ")
    with pytest.raises(UserError, match=r"'two words' is neither an existing folder nor a valid hub id"):
        hub.resolve("two words")
    (tmp_path / "f").write_text("")
    with pytest.raises(
        UserError,
        match=r"f is a file; give the folder that holds config.json and the "
        r"safetensors weights",
    ):
        hub.resolve(str(tmp_path / "f"))


def test_the_embedded_model(tmp_path, monkeypatch):
    import importlib.resources

    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(
        UserError,
        match=r"the embedded model tiny is not in this installation; install "
        r"mlx-posttrain again",
    ):
        hub.resolve("tiny")
    where = folder(tmp_path / "assets" / "tiny")
    assert hub.resolve("tiny") == where


# config.json


def test_check_config(tmp_path):
    where = folder(tmp_path / "m", {"config.json": b'{"model_type": "gpt2", "n_layer": 2}'})
    assert (
        hub.check_config(where)
        == hub.check_config(where / "config.json")
        == {**gpt2.DEFAULTS, "model_type": "gpt2", "n_layer": 2}
    )
    assert hub.check_config(folder(tmp_path / "llama", {"config.json": b'{"model_type": "llama"}'})) == {
        "model_type": "llama"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b'{"model_type": "gpt2",\n "n_layer": }',
            r"config.json is not valid JSON: Expecting value at line 2, column 13",
        ),
        (b"[]", r"config.json must hold a JSON object, found list"),
        (b"{}", r"config.json names no model_type"),
        (b"\xff\xfe{", r"config.json is not valid JSON: it is not UTF-8 text"),
    ],
)
def test_broken_configs(tmp_path, text, message):
    where = folder(tmp_path / "m", {"config.json": text})
    with pytest.raises(UserError, match=message):
        hub.check_config(where)
    with pytest.raises(UserError, match=r"config.json does not exist"):
        hub.check_config(folder(tmp_path / "empty", {}))


# The cache, offline


def test_cached_models_need_no_network(tmp_path):
    full = cache(tmp_path, "acme/model")
    legacy = cache(tmp_path, "openai-community/gpt2")
    other = cache(tmp_path, "distilgpt2")
    untokenised = cache(tmp_path, "acme/untokenised", without("tokenizer.json"))
    sharded = {
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        ).encode()
    }
    shards = cache(
        tmp_path,
        "acme/sharded",
        {**without("model.safetensors"), **sharded, "model-00001-of-00001.safetensors": WEIGHTS},
    )
    adapter = cache(
        tmp_path, "acme/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    )
    names = [
        "acme/model",
        "openai-community/gpt2",
        "gpt2",
        "distilbert/distilgpt2",
        "acme/untokenised",
        "acme/sharded",
        "acme/adapter#adapter",
    ]
    answers, errors = run(names, tmp_path, HF_HUB_OFFLINE="1")
    assert answers == [str(p) for p in (full, legacy, legacy, other, untokenised, shards, adapter)]
    assert errors == ""


def test_a_complete_copy_is_used_without_a_request_to_the_hub(tmp_path):
    where = cache(tmp_path, "acme/model")
    answers, _ = run(["acme/model"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # nothing listens there
    assert answers == [str(where)]


def test_hf_home_alone_moves_the_cache(tmp_path):
    where = cache(tmp_path / "home", "acme/model")
    answers, _ = run(["acme/model"], tmp_path, HF_HUB_CACHE=None, HF_HUB_OFFLINE="1")
    assert answers == [str(where)]


def test_offline_and_not_cached(tmp_path):
    answers, _ = run(["acme/model", "gpt2"], tmp_path, HF_HUB_OFFLINE="1")
    expected = (
        "error: {0} is not a folder here and not in the hub cache, and offline mode is on (HF_HUB_OFFLINE); "
        "download it once while online (hf download {0}) or give a folder"
    )
    assert answers == [expected.format("acme/model"), expected.format("gpt2")]
    answers, _ = run(["acme/model"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert answers == [
        "error: acme/model is not a folder here and not in the hub cache, and the hub cannot be reached; "
        "download it once while online (hf download acme/model) or give a folder"
    ]


def test_a_misspelt_run_is_not_looked_up_on_the_hub(tmp_path):
    answers, _ = run(["runs/01_sff"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert answers[0].startswith("error: the folder runs/01_sff does not exist")


def test_an_interrupted_download_is_not_taken_for_a_model(tmp_path):
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode()
    cache(tmp_path, "acme/partial", {**without("model.safetensors"), "model.safetensors.index.json": index})
    cache(
        tmp_path,
        "acme/noindex",
        {**without("model.safetensors"), "model-00001-of-00002.safetensors": WEIGHTS},
    )
    cache(tmp_path, "acme/config", {"config.json": CONFIG})
    answers, _ = run(["acme/partial", "acme/noindex", "acme/config"], tmp_path, HF_HUB_OFFLINE="1")
    for name, answer in zip(("partial", "noindex", "config"), answers):
        assert answer == (
            f"error: acme/{name} is in the hub cache without complete safetensors weights; "
            f"complete it while online (hf download acme/{name}), "
            "or give another model if it has only pickle files such as pytorch_model.bin, which do not load"
        )


# A server that answers like the hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """One model that can be downloaded, and the hub's refusals."""

    protocol_version = "HTTP/1.1"
    files = {
        **FILES,
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"code",
        "onnx/config.json": b"{}",
        "README.md": b"# hello",
    }
    refusals = {
        "acme/missing": (401, {"X-Error-Code": "RepoNotFound"}),
        "acme/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "acme/forbidden": (403, {}),
        "acme/broken": (500, {}),
    }
    requests: list[str] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.requests.append(path)
        for name, (status, headers) in self.refusals.items():
            if name in path:
                return self.answer(status, **{k.replace("-", "_"): v for k, v in headers.items()})
        files = {"config.json": CONFIG, "pytorch_model.bin": b"x"} if "acme/pickle" in path else self.files
        if "/revision/" in path:
            listing = {"id": "acme/model", "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for f, d in files.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        data = files.get(path.split(f"/resolve/{SHA}/")[-1])
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


@pytest.fixture
def fake_hub():
    FakeHub.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download_takes_only_what_is_safe_and_needed(tmp_path, fake_hub):
    cache(tmp_path, "acme/half", {"config.json": CONFIG})  # completed by the download
    answers, progress = run(["acme/model", "acme/half"], tmp_path, HF_ENDPOINT=fake_hub)
    where = tmp_path / "hub" / "models--acme--model" / "snapshots" / SHA
    assert answers == [str(where), str(tmp_path / "hub" / "models--acme--half" / "snapshots" / SHA)]
    assert sorted(p.name for p in where.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "%|" in progress  # the hub's own progress bar
    before = len(FakeHub.requests)
    assert run(["acme/model"], tmp_path, HF_ENDPOINT=fake_hub)[0] == [str(where)]
    assert len(FakeHub.requests) == before


def test_refusals_of_the_hub(tmp_path, fake_hub):
    answers, _ = run(
        ["acme/missing", "acme/gated", "acme/forbidden", "acme/pickle"], tmp_path, HF_ENDPOINT=fake_hub
    )
    assert answers == [
        "error: acme/missing is neither an existing folder nor a model on the hub; "
        "check the spelling, or if it is private run: hf auth login",
        "error: acme/gated is gated: accept its terms at https://huggingface.co/acme/gated, then run: hf "
        "auth login",
        "error: the hub refused access to acme/forbidden (HTTP 403); run: hf auth login",
        "error: acme/pickle has no model.safetensors; only safetensors weights load",
    ]


def test_a_hub_that_is_down(tmp_path, fake_hub):
    answers, _ = run(["acme/broken"], tmp_path, HF_ENDPOINT=fake_hub)
    assert answers == [
        "error: the hub answered HTTP 500 for acme/broken, which is not in the cache; try "
        "again later or give a folder"
    ]
