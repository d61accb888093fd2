from __future__ import annotations

import hashlib
import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cut_by_hand, tiny_batch, tiny_model, tiny_project

from distill import load_student
from distill.errors import InputError
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
    drawn = [load_model(tmp_path, head, new_head=True, random_seed=seed).classifier.weight for seed in (1, 1, 2)]
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
    with pytest.raises(InputError, match=r"no trained weights for model\.layers\.1\.mlp\.down_proj\.weight"):
        load_student(tmp_path)


def test_a_trained_teacher_keeps_its_order_of_classes(folder):
    assert trained_labels(folder) == ["b", "a", "c"]


def test_pickled_weights_are_refused(folder):
    model = tiny_model("bert")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
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
