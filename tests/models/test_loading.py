from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYERS, cut_by_hand, tiny_batch, tiny_inputs, tiny_model, tiny_project
from transformers import AutoModelForCausalLM

from distill import load_student
from distill.errors import InputError
from distill.models.causal import check_causal
from distill.models.load import ModelHead, load_model, load_tokenizer, random_model, teacher_path, trained_labels
from distill.recipe.schema import Teacher

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert", id2label={0: "b", 1: "a", 2: "c"}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_hub_id_is_the_snapshot_in_the_cache(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        found = teacher_path(Teacher(model="org/tiny", revision=revision), tmp_path)
        assert load_model(found, ModelHead(CLASSIFIER)).config.num_hidden_layers == 4
    with pytest.raises(InputError, match="cannot get 'org/other' from the model hub"):
        teacher_path(Teacher(model="org/other"), tmp_path)


def test_weights_with_another_checksum_are_refused(folder, tmp_path):
    good = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert teacher_path(Teacher(model="./model", sha256=good), tmp_path) == folder
    with pytest.raises(InputError, match=r"teacher\.sha256"):
        teacher_path(Teacher(model="./model", sha256="0" * 64), tmp_path)


def test_a_head_without_weights_is_refused_unless_it_is_about_to_be_fitted(tmp_path):
    tiny_model("bert").bert.save_pretrained(tmp_path)
    head = ModelHead(CLASSIFIER, ("x", "y"))
    with pytest.raises(InputError, match=r"no trained weights for classifier.*fit"):
        load_model(tmp_path, head)
    drawn = [
        load_model(tmp_path, head, allow_untrained_head=True, random_seed=seed).classifier.weight for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape[0] == 2


def test_different_widths_load_in_shards_in_their_dtype_and_miss_nothing_silently(tmp_path):
    student = cut_by_hand(tiny_model("llama", tie_word_embeddings=True).bfloat16(), (0, 2), (40, 16))
    student.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    loaded = load_student(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch()).logits, student(**tiny_batch()).logits)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    place = index["weight_map"].pop("model.layers.1.mlp.down_proj.weight")
    tensors = load_file(tmp_path / place)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / place, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks 1 of 21 tensors \(model\.layers\.1\.mlp\.down_proj\.weight\)"):
        load_student(tmp_path)


def test_a_trained_teacher_keeps_its_order_of_classes(folder):
    assert trained_labels(folder) == ["b", "a", "c"]


def test_pickled_weights_are_refused(folder):
    model = tiny_model("bert")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load_model(folder, ModelHead(CLASSIFIER))


def test_modelling_code_in_the_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {CLASSIFIER: "evil.Evil", "AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError):
        load_model(folder, ModelHead(CLASSIFIER))
    with pytest.raises(InputError):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"architectures": ["NoSuchModel"], "model_type": "bert"}'])
def test_a_folder_that_is_no_student_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=str(tmp_path)):
        load_student(tmp_path)


def test_random_weights_follow_from_the_seed(tmp_path):
    tiny_project(tmp_path)
    head = ModelHead(CLASSIFIER, ("x", "y"), padding=0)
    first, again, other = (random_model(tmp_path / "teacher", head, seed) for seed in (1, 1, 2))
    batch = tiny_batch(padded=False)
    batch["input_ids"] %= 16
    with torch.no_grad():
        logits = [model(**batch).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert first.config.id2label == {0: "x", 1: "y"}


def rewrite(folder, change):
    """Replace the tensors of a folder by what `change` makes of them, and return them."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_head_of_its_own_beside_a_tied_config_stays_in_teacher_and_student(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "teacher")
    own = torch.randn(64, 32)
    rewrite(tmp_path / "teacher", lambda tensors: {**tensors, "lm_head.weight": own})
    lines = []
    teacher = load_model(tmp_path / "teacher", ModelHead("AutoModelForCausalLM"), say=lines.append)
    assert torch.equal(teacher.lm_head.weight, own) and not teacher.config.tie_word_embeddings
    assert "lm_head.weight" in lines[0] and "model.embed_tokens.weight" in lines[0]
    cut_by_hand(teacher, range(LAYERS)).save_pretrained(tmp_path / "student")
    stock = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student")]
    with torch.no_grad():
        logits = [model(**tiny_batch()).logits for model in (*stock, teacher, load_student(tmp_path / "student"))]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
@pytest.mark.parametrize("part", ["encoder.embed_tokens.weight", "lm_head.weight"])
def test_embeddings_of_an_encoder_decoder_that_differ_in_the_file_stay_apart(tmp_path, family, part):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "teacher")
    name = next(name for name in model.state_dict() if name.endswith(part))
    own = torch.randn_like(model.state_dict()[name])
    rewrite(tmp_path / "teacher", lambda tensors: {**tensors, name: own})
    teacher = load_model(tmp_path / "teacher", ModelHead("AutoModelForSeq2SeqLM"))
    assert torch.equal(teacher.state_dict()[name], own)
    cut_by_hand(teacher, range(LAYERS)).save_pretrained(tmp_path / "student")
    student = load_student(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(teacher(**tiny_inputs(teacher)).logits, student(**tiny_inputs(student)).logits)


@pytest.mark.parametrize("fitted", [True, False])
def test_an_untied_config_without_a_head_in_the_file_is_refused_with_both_names(tmp_path, fitted):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    set_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight.*tie_word_embeddings: true") as caught:
        load_model(tmp_path, ModelHead("AutoModelForCausalLM"), allow_untrained_head=fitted)
    assert "fit" not in str(caught.value).replace(str(tmp_path), "")


def without_a_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layer.2." not in name}


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, r"lacks 69 of 73 tensors .* has 73 .*'_orig_mod\.'"),
        (lambda t: {f"module.{n}": v for n, v in t.items()}, r"lacks 69 of 73 tensors .* has 73 .*'module\.'"),
        (lambda t: {f"model.{n}": v for n, v in t.items()}, r"lacks 69 of 73 tensors .* has 73 .*'model\.'"),
        (without_a_layer, r"lacks 16 of 73 tensors \(bert\.encoder\.layer\.2\..*and 13 more\) and has no other"),
    ],
)
def test_a_backbone_without_its_weights_is_refused_and_never_drawn(folder, change, words, fitted):
    rewrite(folder, change)
    with pytest.raises(InputError, match=words) as caught:
        load_model(folder, ModelHead(CLASSIFIER, ("b", "a", "c")), allow_untrained_head=fitted, random_seed=0)
    assert "`teacher:`" not in str(caught.value)


@pytest.mark.parametrize("fitted", [True, False])
def test_a_config_of_another_size_is_refused_with_both_shapes(folder, fitted):
    set_config(folder, hidden_size=48)
    with pytest.raises(InputError, match=r"embeddings.LayerNorm.bias is \[32\] in the file, \[48\] by config"):
        load_model(folder, ModelHead(CLASSIFIER), allow_untrained_head=fitted)


def test_only_a_new_head_and_a_pooler_that_was_never_there_are_drawn_and_said(folder):
    before = rewrite(folder, lambda t: {n: v for n, v in t.items() if "pooler" not in n} | {"cls.bias": torch.ones(2)})
    lines = []
    model = load_model(folder, ModelHead(CLASSIFIER, ("x", "y")), allow_untrained_head=True, say=lines.append)
    assert lines == [
        "  drawn at random, to be fitted: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias and 1 more",
        f"  in {folder} and not part of a BertForSequenceClassification: cls.bias",
    ]
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in before and "classifier" not in name}
    assert len(kept) == 69 and all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    with pytest.raises(InputError, match=r"no trained weights for bert\.pooler.*add `fit"):
        load_model(folder, ModelHead(CLASSIFIER, ("x", "y")))
    rewrite(folder, lambda tensors: {**tensors, "bert.pooler.dense.bias": torch.ones(32)})
    with pytest.raises(InputError, match=r"lacks 1 of 73 tensors \(bert\.pooler\.dense\.weight\)"):
        load_model(folder, ModelHead(CLASSIFIER, ("x", "y")), allow_untrained_head=True)


@pytest.mark.parametrize("way", ["index to a pickle", "index outside", "absolute", "named elsewhere", "named pickle"])
def test_weights_that_are_not_safetensors_of_the_folder_itself_are_refused(folder, tmp_path, way):
    weights = folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "other.safetensors")
    names = {"index to a pickle": "evil.bin", "index outside": "../other.safetensors"}
    names["absolute"] = str(tmp_path / "other.safetensors")
    torch.save(load_file(weights), folder / "evil.bin")
    if way.startswith("named"):
        set_config(folder, transformers_weights={"named elsewhere": "../other.safetensors"}.get(way, "evil.bin"))
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), names[way])}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    with pytest.raises(InputError, match=r"only safetensors weights are read|does not lie in the folder itself"):
        load_model(folder, ModelHead(CLASSIFIER))
    with pytest.raises(InputError, match=str(folder)):
        teacher_path(Teacher(model="./model", sha256="0" * 64), tmp_path)


def test_an_adapter_and_parts_of_a_distributed_checkpoint_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter"):
        load_model(folder, ModelHead(CLASSIFIER))
    (folder / "adapter_config.json").unlink()
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(InputError, match="training checkpoint"):
        load_model(folder, ModelHead(CLASSIFIER))


def test_links_out_of_a_teacher_are_refused_and_those_of_a_snapshot_are_not(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"chat_template\.jinja is a link"):
        teacher_path(Teacher(model="./model"), tmp_path)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "linked").symlink_to(folder)
    assert teacher_path(Teacher(model="./linked"), tmp_path) == tmp_path / "linked"
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert load_model(teacher_path(Teacher(model=str(snapshot)), tmp_path), ModelHead(CLASSIFIER)).num_labels == 3
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match=r"vocab\.txt is a link"):
        teacher_path(Teacher(model=str(snapshot)), tmp_path)


def test_a_checksum_pins_the_file_that_the_config_names_and_every_shard(folder, tmp_path):
    good = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    set_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(InputError, match=r"teacher\.sha256"):
        teacher_path(Teacher(model="./model", sha256=good), tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    listed = subprocess.run("sha256sum model-*.safetensors | sha256sum", shell=True, cwd=tmp_path / "shards",
                            capture_output=True, text=True, check=True)  # fmt: skip
    pinned = Teacher(model="./shards", sha256=listed.stdout.split()[0])
    assert teacher_path(pinned, tmp_path) == tmp_path / "shards"
    last = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last)
    with pytest.raises(InputError, match=r"teacher\.sha256"):
        teacher_path(pinned, tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, number):
    rewrite(folder, lambda tensors: {**tensors, "classifier.bias": torch.tensor([0.0, number, 0.0])})
    with pytest.raises(InputError, match=r"not finite, in classifier\.bias"):
        load_model(folder, ModelHead(CLASSIFIER))


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "BertTokenizer"}])
def test_a_folder_without_the_words_of_its_tokenizer_is_refused(settings, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)  # of which transformers makes a tokenizer of five special tokens
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="without words" if settings else "holds no tokenizer: save"):
        load_tokenizer(tmp_path)


def test_two_sets_of_weights_in_one_folder_are_refused(folder):
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        load_model(folder, ModelHead(CLASSIFIER))


def test_a_config_that_asks_for_tuples_gives_the_same_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    set_config(tmp_path, return_dict=False, output_attentions=True, output_hidden_states=True)
    model = load_model(tmp_path, ModelHead("AutoModelForCausalLM"))
    check_causal(model)
    model.save_pretrained(tmp_path / "again")  # refused by transformers with attentions that no kernel gives


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_vectors_need_no_pooler(family, tmp_path):
    tiny_model(family).base_model.save_pretrained(tmp_path)
    if family == "bert":
        rewrite(tmp_path, lambda tensors: {name: own for name, own in tensors.items() if "pooler" not in name})
    lines = []
    load_model(tmp_path, ModelHead("AutoModel", pooled=True), say=lines.append)
    assert lines[0] == "  drawn at random, and no part of a vector: pooler.dense.bias, pooler.dense.weight"
    with pytest.raises(InputError, match="lacks 2 of"):
        load_model(tmp_path, ModelHead("AutoModel"))


OVERLAP = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 7 + b"\x3f" + b"{}", len(OVERLAP).to_bytes(8, "little") + OVERLAP + b"\0" * 4],
    ids=["empty", "huge header", "overlap"],
)
def test_a_malformed_weight_file_gives_one_message(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"cannot load {folder}"):
        load_model(folder, ModelHead(CLASSIFIER))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "abc"},
        {"hidden_act": "no such"},
        {"num_attention_heads": 0},
        {"dtype": "load"},
        {"vocab_size": -1},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"attn_implementation": "attacker/kernel"},
        {"per_layer_config": "text"},
        {"transformers_weights": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_malformed_config_gives_one_message(folder, change):
    set_config(folder, **change)
    with pytest.raises(InputError, match=str(folder)):
        load_model(folder, ModelHead(CLASSIFIER))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"added_tokens": 7}'])
def test_malformed_json_gives_one_message(tmp_path, name, text):
    tiny_project(tmp_path)
    teacher = tmp_path / "teacher"
    (teacher / name).write_text(text)
    with pytest.raises(InputError, match=str(teacher)):
        load_tokenizer(teacher)
        load_model(teacher, ModelHead(CLASSIFIER))


def test_an_architecture_that_is_no_model_class_is_refused(folder):
    set_config(folder, architectures=["pipeline"])
    with pytest.raises(InputError, match="no model class 'pipeline'"):
        load_student(folder)
