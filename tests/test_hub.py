"""Adapters from the Hub: a small hub on loopback, a client process per case, no network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from peftc.hub import AdapterFiles

DATA = Path(__file__).parent / "data" / "real"
FILES = ["adapter_config.json", "adapter_model.safetensors"]
MOVIES = {name: (DATA / "movies" / name).read_bytes() for name in FILES}

CLIENT = """
import json, sys
from peftc.hub import AdapterFiles
request = json.loads(sys.argv[1])
assert "huggingface_hub" not in sys.modules
try:
    files = AdapterFiles(request.pop("location"), **request)
    print(json.dumps({"config": files.config(), "weights": files.weights()}))
except Exception as error:
    print(json.dumps({"error": type(error).__mro__[0].__name__, "bases": [t.__name__ for t in type(error).__mro__],
                      "text": str(error)}))
"""


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def ask(hub, tmp_path):
    """Ask for an adapter's files in a fresh process whose Hub is `hub`; its cache lives as long as the test."""

    def run(location, env=None, **options):
        out = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps({"location": location, **options})],
            env=hub.env(tmp_path / "home", **(env or {})),
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout.splitlines()[-1])

    return run


def content(answer):
    assert "error" not in answer, answer
    return {"config": Path(answer["config"]).read_bytes(), "weights": Path(answer["weights"]).read_bytes()}


def refused(answer, kind, *texts):
    assert kind in answer.get("bases", []), answer
    for text in texts:
        assert text in answer["text"], answer["text"]


def test_download_then_cache_then_offline(hub, ask, tmp_path):
    hub.add("user/movies", MOVIES)
    first = ask("user/movies")
    assert content(first)["weights"] == MOVIES["adapter_model.safetensors"]
    assert f"snapshots/{hub.commit('user/movies', 'main')}" in first["config"]
    assert (tmp_path / "home" / "hub" / "models--user--movies" / "refs" / "main").is_file()

    before = len(hub.requests)
    assert ask("user/movies", env={"HF_HUB_OFFLINE": "1"}) == first
    assert ask("user/movies", local_files_only=True) == first
    assert len(hub.requests) == before


def test_subfolder_online_and_offline(hub, ask):
    """The reference looks for SUB/SUB when it is offline."""
    hub.add("user/many", {f"sub/{name}": data for name, data in MOVIES.items()})
    first = ask("user/many", subfolder="sub")
    assert content(first)["config"] == MOVIES["adapter_config.json"]
    assert ask("user/many", subfolder="sub", env={"HF_HUB_OFFLINE": "1"}) == first
    refused(ask("user/many"), "ValueError", "adapter model file not found in user/many")
    refused(ask("user/many", subfolder="other"), "ValueError", "subfolder other", "other/adapter_config.json")


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "feature/x"])
def test_revision(hub, ask, revision):
    other = {**MOVIES, "adapter_model.safetensors": b"of the revision"}
    hub.add("user/movies", MOVIES)
    hub.add("user/movies", other, revision)
    assert content(ask("user/movies", revision=revision))["weights"] == b"of the revision"
    assert content(ask("user/movies", revision=hub.commit("user/movies", revision)))["weights"] == b"of the revision"
    assert content(ask("user/movies"))["weights"] == MOVIES["adapter_model.safetensors"]


def test_unknown_revision(hub, ask):
    hub.add("user/movies", MOVIES)
    refused(ask("user/movies", revision="nope"), "OSError", "no revision 'nope'")


def test_both_files_come_from_one_commit(hub, ask):
    """A push between the two downloads must not mix adapters: the second asks for the commit of the first."""
    hub.add("user/movies", MOVIES)
    ask("user/movies")
    asked = [path for method, path, _ in hub.requests if path.endswith(".safetensors")]
    assert asked and all(f"/resolve/{hub.commit('user/movies', 'main')}/" in path for path in asked)


def test_token_is_sent_and_needed(hub, ask):
    hub.add("user/private", MOVIES)
    hub.tokens["user/private"] = "hf_secret"
    refused(ask("user/private"), "OSError", "token")
    answer = ask("user/private", token="wrong")
    refused(answer, "OSError", "token")
    assert "wrong" not in answer["text"]
    assert content(ask("user/private", token="hf_secret"))["weights"] == MOVIES["adapter_model.safetensors"]
    sent = [authorization for *_, authorization in hub.requests][-1]
    assert sent == "Bearer hf_secret"


def test_gated_repository(hub, ask):
    hub.add("user/gated", MOVIES)
    hub.gated.add("user/gated")
    refused(ask("user/gated"), "OSError", "access to 'user/gated' is restricted")


def test_missing_repository(hub, ask):
    refused(ask("user/nothing"), "OSError", "'user/nothing' is neither a local folder nor a repository")


def test_bin_only_when_there_are_no_safetensors(hub, ask):
    hub.add("user/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    first = ask("user/old")
    assert content(first)["weights"] == b"pickle"
    assert ask("user/old", env={"HF_HUB_OFFLINE": "1"}) == first
    hub.add("user/both", {**MOVIES, "adapter_model.bin": b"pickle"})
    assert content(ask("user/both"))["weights"] == MOVIES["adapter_model.safetensors"]


def test_no_weights(hub, ask):
    hub.add("user/empty", {"adapter_config.json": b"{}"})
    refused(ask("user/empty"), "ValueError", "no adapter weights in 'user/empty'")


def test_offline_without_cache(ask):
    refused(ask("user/movies", env={"HF_HUB_OFFLINE": "1"}), "ValueError", "HF_HUB_OFFLINE is set", "not in the cache")
    refused(ask("user/movies", local_files_only=True), "ValueError", "local_files_only=True")


def test_no_answer(monkeypatch):
    """huggingface_hub retries for some seconds, so its last word is given here."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach it")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match="the Hub does not answer"):
        AdapterFiles("user/movies").config()


def test_cache_dir(hub, ask, tmp_path):
    hub.add("user/movies", MOVIES)
    answer = ask("user/movies", cache_dir=str(tmp_path / "mine"))
    assert answer["config"].startswith(str(tmp_path / "mine"))
    refused(ask("user/movies", env={"HF_HUB_OFFLINE": "1"}), "ValueError", "not in the cache")


def test_force_download(hub, ask):
    hub.add("user/movies", MOVIES)
    ask("user/movies")
    before = len(hub.requests)
    ask("user/movies", force_download=True)
    assert sum(method == "GET" for method, *_ in hub.requests[before:]) == 2


@pytest.mark.parametrize("location", ["./none", "/no/such/folder", "a/b/c", "~/x", ""])
def test_what_cannot_be_a_repository_is_not_asked_for(hub, ask, location):
    refused(ask(location), "FileNotFoundError", "there is no folder")
    assert hub.requests == []


def test_bad_id(ask):
    refused(ask("user/..x--"), "OSError", "neither a local folder nor the id of a repository")


def test_unknown_option(ask):
    refused(ask("user/movies", subfoldr="x"), "TypeError", "'subfoldr'")


def test_local_folder(ask, tmp_path):
    answer = ask(str(DATA / "movies"))
    assert answer["config"] == str(DATA / "movies" / "adapter_config.json")
    assert ask(str(DATA), subfolder="movies") == answer
    refused(ask(str(tmp_path)), "ValueError", "adapter model file not found in")
    refused(ask(answer["config"]), "OSError", "is a file")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(ask(str(tmp_path)), "ValueError", "no adapter weights in")
