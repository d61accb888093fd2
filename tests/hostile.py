"""Folders of strangers that try to run code, to write elsewhere, to ask the network, to leak or never to end."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import resource
import socket
import sys
import tempfile

DEEP = "[" * 100_000 + "]" * 100_000
ESCAPES = "\x1b]0;owned\x07\x1b[2Jevil\x9b31m"
SECRETS = {"HF_TOKEN": "hf_TokenOfTheUser", "WANDB_API_KEY": "KeyOfTheUser", "AWS_SECRET_ACCESS_KEY": "CloudOfTheUser"}
WRITES = {
    "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.rename", "os.link", "os.symlink",
}  # fmt: skip
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "ctypes.dlopen"}
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def strike(project, run, commands, seconds=20, gigabytes=12):
    """Be `distill` for some commands, with little time and memory; end with 99 at what no stranger may bring about.

    Ends with 0 where every command ended with the code that stands before it.
    """
    import huggingface_hub.constants

    from distill.cli import main

    huggingface_hub.constants.HF_HUB_OFFLINE = False  # nothing holds it back but itself
    os.chdir(project)
    tempfile.tempdir = os.environ["TMPDIR"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    sys.addaudithook(_watch(project, [run, os.environ["TMPDIR"], os.environ["DISTILL_CACHE"], "/dev", "/proc"]))
    for expected, *arguments in commands:
        code = main(arguments)
        if code != expected:
            sys.exit(f"distill {' '.join(arguments)} ended with {code}, not {expected}")


def _watch(project, allowed):
    """Make an audit hook that ends the process at a connection, a foreign program or a change elsewhere."""

    def is_allowed(path):
        text = os.path.abspath(os.fsdecode(path))
        return any(f"{text}/".startswith(f"{root}/") for root in map(str, allowed))

    def is_broken(event, given):
        if event == "open":
            path, _, flags = given
            return not isinstance(path, int) and flags & CHANGES and not is_allowed(path)
        if event in WRITES:
            # What is named from an open folder, as `rmtree` does, lies in one that was looked at before.
            own = given[-2 if event in ("os.link", "os.symlink") else 0 :] if event != "os.rename" else given[:2]
            paths = [path for path in own if isinstance(path, str | bytes | os.PathLike)]
            return any(os.path.isabs(os.fsdecode(path)) and not is_allowed(path) for path in paths)
        if event == "subprocess.Popen":  # the gate of a release starts Python, in isolation
            return list(given[1])[:2] != [sys.executable, "-I"]
        if event in ("exec", "compile"):
            name = getattr(given[0], "co_filename", "") if event == "exec" else given[1] or ""
            return str(name).startswith(str(project))
        return event in NETWORK | STARTS or event == "pickle.find_class"

    def watch(event, given):
        if is_broken(event, given):
            os.write(2, f"BROKEN: {event} {given!r}\n".encode()[:2000])
            os._exit(99)

    return watch


class Payload:
    """What a pickle may run."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


def config(project, name="config.json", **changes):
    """Change keys of a config of the teacher."""
    path = project / "teacher" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header(text):
    """A safetensors file with this header."""
    return len(text).to_bytes(8, "little") + text.encode() + bytes(8)


def index(project, name):
    """Send every tensor to a file."""
    (project / "teacher/model.safetensors").unlink()
    weights = json.dumps({"weight_map": {"bert.pooler.dense.bias": name}})
    (project / "teacher/model.safetensors.index.json").write_text(weights)


def parquet(project, kind, values, metadata=None):
    """A parquet file whose metadata call the texts something else."""
    import pyarrow as pa
    from pyarrow import parquet as files

    features = {"text": {"_type": kind}, "label": {"_type": "Value", "dtype": "string"}}
    metadata = metadata or json.dumps({"info": {"features": features}})
    table = pa.table({"text": values, "label": ["none"] * len(values)})
    files.write_table(table.replace_schema_metadata({"huggingface": metadata}), project / "own.parquet")


def saved(project, **changes):
    """A folder of `save_to_disk`, with another state."""
    import datasets

    rows = {"text": ["red cat", "blue dog"] * 20, "label": ["none", "mammal"] * 20}
    datasets.Dataset.from_dict(rows).save_to_disk(project / "saved")
    state = json.loads((project / "saved/state.json").read_text())
    (project / "saved/state.json").write_text(json.dumps(state | changes))


def server():
    """Listen on a port of this machine; returns the socket and its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"


def put(name, content):
    """Make a change that writes a file of the project."""

    def change(project):
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))

    return change


def link(name, target):
    """Make a change that puts a link in the place of a file; `{}` of the target stands for the project."""

    def change(project):
        (project / name).unlink(missing_ok=True)
        (project / name).symlink_to(target.format(project))

    return change


def pipe(name):
    """Make a change that puts a pipe, which never ends, in the place of a file."""

    def change(project):
        (project / name).unlink(missing_ok=True)
        os.mkfifo(project / name)

    return change


def says(name="config.json", **changes):
    """Make a change of keys of a config."""
    return lambda project: config(project, name, **changes)


def row(text):
    """Make a change that adds a line to the data."""

    def change(project):
        with (project / "data.jsonl").open("ab") as file:
            file.write(text if isinstance(text, bytes) else f"{text}\n".encode())

    return change


def both(*changes):
    """Make a change of several."""
    return lambda project: [change(project) for change in changes]


def gone(name):
    """Make a change that removes a file."""
    return lambda project: (project / name).unlink()


def slow(project):
    """Make the tokenizer go back and back."""
    rule = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    config(project, "tokenizer.json", pre_tokenizer=rule)


PICKLE = pickle.dumps(Payload())
ELSEWHERE = [{"filename": "../../outside/secret.txt"}]
NO_WORDS = gone("teacher/tokenizer.json")
ALL, READ = ("validate", "inspect", "plan"), ("plan",)
TEACHER, DATA = ("inspect", "plan"), ("validate", "plan")
TEACHERS = {
    "pickle alone": (ALL, both(gone("teacher/model.safetensors"), put("teacher/pytorch_model.bin", PICKLE))),
    "pickle called safetensors": (ALL, put("teacher/model.safetensors", PICKLE)),
    "index to a pickle": (ALL, both(put("teacher/evil.bin", PICKLE), lambda p: index(p, "evil.bin"))),
    "index outside": (ALL, lambda p: index(p, "../../outside/w.safetensors")),
    "index to a place": (ALL, lambda p: index(p, "/etc/w.safetensors")),
    "weights named elsewhere": (ALL, says(transformers_weights="../w.safetensors")),
    "linked weights": (ALL, link("teacher/model.safetensors", "{}/../outside/w.safetensors")),
    "linked config": (TEACHER, link("teacher/config.json", "{}/../outside/secret.txt")),
    "linked template": (TEACHER, link("teacher/chat_template.jinja", "{}/../outside/secret.txt")),
    "linked folder": (TEACHER, link("teacher/1_Pooling", "{}/../outside")),
    "loop of links": (TEACHER, link("teacher/extra.json", "extra.json")),
    "link to nothing": (TEACHER, link("teacher/extra.json", "nothing")),
    "endless config": (ALL, link("teacher/config.json", "/dev/zero")),
    "pipe as config": (ALL, pipe("teacher/config.json")),
    "pipe as weights": (ALL, pipe("teacher/model.safetensors")),
    "pipe as tokenizer": (TEACHER, pipe("teacher/tokenizer.json")),
    "pipe beside": (TEACHER, pipe("teacher/extra.txt")),
    "10^7 layers": (ALL, says(num_hidden_layers=10**7)),
    "10^4 layers": (ALL, says(num_hidden_layers=10**4)),
    "vocabulary of 10^12": (ALL, says(vocab_size=10**12)),
    "hidden size of 10^9": (ALL, says(hidden_size=10**9)),
    "hidden size of 10^6": (ALL, says(hidden_size=10**6)),
    "0 heads": (ALL, says(num_attention_heads=0)),
    "-4 heads": (ALL, says(num_attention_heads=-4)),
    "10^10 classes": (ALL, says(num_labels=10**10)),
    "text for a number": (ALL, says(hidden_size="abc")),
    "text of digits": (ALL, says(num_hidden_layers="9" * 5000)),
    "10^9 neurons of a layer": (ALL, says(per_layer_config={"0": {"intermediate_size": 10**9}})),
    "10^9 layers inside": (ALL, says(text_config={"num_hidden_layers": 10**9})),
    "kernel of others": (ALL, says(attn_implementation="attacker/kernel")),
    "another kind": (ALL, says(model_type=["bert"])),
    "class of another kind": (("inspect",), says(model_type="mistral")),
    "no model class": (("inspect",), says(architectures=["pipeline"])),
    "deep config": (ALL, put("teacher/config.json", DEEP)),
    "deep tokenizer config": (TEACHER, put("teacher/tokenizer_config.json", '{"a":' + DEEP + "}")),
    "deep tokenizer": (ALL, put("teacher/tokenizer.json", DEEP)),
    "deep header": (ALL, put("teacher/model.safetensors", header(DEEP))),
    "huge header": (ALL, put("teacher/model.safetensors", (2**62).to_bytes(8, "little") + b"{}")),
    "number of 10^5 digits": (ALL, put("teacher/config.json", '{"vocab_size": ' + "9" * 100_000 + "}")),
    "tokenizer of a file elsewhere": (TEACHER, says("tokenizer_config.json", vocab_file="../../outside/secret.txt")),
    "tokenizer of files elsewhere": (TEACHER, says("tokenizer_config.json", init_inputs=["../../outside/secret.txt"])),
    "tokenizer of no length": (READ, says("tokenizer_config.json", model_max_length="x")),
    "tokenizer of nothing": (READ, both(says("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"), NO_WORDS)),
    "tokenizer that is none": (READ, both(says("tokenizer_config.json", tokenizer_class="RagTokenizer"), NO_WORDS)),
    "tokenizer that goes back and back": (READ, both(slow, row(json.dumps({"text": "a" * 60 + "!", "label": "none"})))),
}  # fmt: skip
"""What is done to a teacher's folder: name -> (commands that must refuse it, change)."""


ROWS = {
    "deep row": (READ, row('{"text":"x","label":"none","z":' + DEEP + "}"), ""),
    "deep parquet metadata": (READ, lambda p: parquet(p, "Value", ["x"] * 9, DEEP), "own.parquet"),
    "pictures": (READ, lambda p: parquet(p, "Image", [{"path": "/etc/passwd", "bytes": None}] * 9), "own.parquet"),
    "pipe": (DATA, pipe("data.jsonl"), ""),
    "endless": (DATA, link("data.jsonl", "/dev/zero"), ""),
    "bytes that are no text": (READ, row(b'{"text": "\xff"}\n'), ""),
    "300,000 columns": (DATA, put("own.csv", ",".join(f"c{i}" for i in range(300_000)) + "\n"), "own.csv"),
    "20,000 columns": (DATA, put("own.csv", ",".join(f"\x1b[2J{i}" for i in range(20_000)) + "\n1"), "own.csv"),
    "names that steer": (DATA, put("own.jsonl", json.dumps({ESCAPES: 1})), "own.jsonl"),
    "labels that steer": (READ, row(json.dumps({"text": "red", "label": ESCAPES})), ""),
    "bomb of gzip": (DATA, lambda p: put("own.jsonl.gz", gzip.compress(b"a" * 100_000_000, 1))(p), "own.jsonl.gz"),
    "bomb of spaces": (DATA, lambda p: put("own.jsonl.gz", gzip.compress(b" " * 300_000_000))(p), "own.jsonl.gz"),
    "bomb of bzip2": (DATA, lambda p: put("own.csv.bz2", bz2.compress(b"a" * 100_000_000))(p), "own.csv.bz2"),
    "saved dataset of files elsewhere": (READ, lambda p: saved(p, _data_files=ELSEWHERE), "saved"),
    "saved dataset of splits elsewhere": (READ, put("saved/dataset_dict.json", '{"splits": ["../x"]}'), "saved"),
    "deep saved dataset": (READ, put("saved/state.json", DEEP), "saved"),
}  # fmt: skip
"""What is done to data: name -> (commands that must refuse it, change, file that the recipe names)."""


RECIPES = {
    "pipe": pipe("recipe.yaml"),
    "endless": link("recipe.yaml", "/dev/zero"),
    "deep": put("recipe.yaml", "a: " + DEEP),
    "name that steers": put("recipe.yaml", f"name: {json.dumps(ESCAPES)}"),
    "name elsewhere": put("recipe.yaml", "name: ../../evil"),
    "code": put("recipe.yaml", "name: !!python/object/apply:os.system ['touch RAN']"),
    "package elsewhere": put("recipe.yaml", "name: x\nteacher: {model: 'package:json/../../..'}"),
    "trust": put("recipe.yaml", "name: x\ntrust_remote_code: true"),
}
"""What is done to a recipe: name -> change. `validate` must refuse it."""
