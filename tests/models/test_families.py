"""Every family: cut, train, save, load and use, and the invariants of cutting that must hold for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import (
    DECODERS,
    ENCODERS,
    NO_ROW,
    OWN_SIZES,
    PREDICTION_KINDS,
    SEQ2SEQ,
    SIZES,
    WIDTH,
    cut_by_hand,
    generate,
    tiny_inputs,
    tiny_model,
)  # fmt: skip
from transformers import AutoConfig

from distill import load_student
from distill.errors import InputError
from distill.models.axes import keep_units, pad_units, spread_units, sum_per_unit
from distill.models.family import _detected, layers_of, layout_of, use_eager_attention
from distill.models.layout import LAYOUTS, UnitDim
from distill.models.load import ModelHead, load_model
from distill.models.mlp import mlps_of
from distill.models.pattern import PER_LAYER_LISTS
from distill.models.widths import is_unequal, pad_to_largest
from distill.recipe.locate import teacher_size

POST_NORM = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "bart", "marian")
WRITES_TO_THE_STREAM = ("o_proj", "c_proj", "dense", "out_proj", "Wo", "o", "wo", "fc2", "down_proj", "dense_4h_to_h")


def logits(model, **settings):
    with torch.no_grad():
        return model(**tiny_inputs(model, **settings))[0]


def assert_close(model, other, atol=2e-6):
    """Logits equal but for rounding; some tiny models have large ones."""
    expected = logits(other)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=atol * max(1, expected.abs().max().item()))


def train_one_step(model):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    output = model(**tiny_inputs(model)).logits
    torch.nn.functional.cross_entropy(output.flatten(0, -2), output.detach().flatten(0, -2).argmin(-1)).backward()
    optimizer.step()
    return model.eval()


def same_files(one, other):
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def all_mlps(model):
    return [mlp for side in layout_of(model).sides for mlp in mlps_of(model, side)]


def assert_consistent(student):
    """Layers are numbered from 0, lists have an entry per layer, and modules know the sizes of their weights."""
    for mlp in all_mlps(student):
        for module in mlp.layer.modules():
            if isinstance(module, torch.nn.Linear):
                assert (module.out_features, module.in_features) == tuple(module.weight.shape)
            if hasattr(module, "nx"):
                assert (module.nx, module.nf) == tuple(module.weight.shape)
        assert mlp.experts is None or mlp.output.intermediate_dim == mlp.width
    for side in layout_of(student).sides:
        for index, layer in enumerate(layers_of(student, side)):
            found = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
            assert found <= ({index} if side == "main" else {index, None})  # some encoders do not number them
    assert all(len(getattr(student.config, name, None) or "ab") == 2 for name in PER_LAYER_LISTS)


def depths(model):
    return {side: range(len(layers_of(model, side))) for side in layout_of(model).sides}


def test_a_cut_student_trains_saves_loads_and_works(any_family, tmp_path):
    teacher = tiny_model(any_family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for widths in [(24, 24), (40, 16)]:
        (tmp_path / str(widths)).mkdir()
        check_student(teacher, any_family, widths, tmp_path / str(widths))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def check_student(teacher, family, widths, folder):
    """Cut a student with these widths, train it, save it, load it and use it."""
    student = cut_by_hand(teacher, (0, 2), widths)
    assert type(student) is type(teacher) and [mlp.width for mlp in mlps_of(student)] == list(widths)
    assert_consistent(student)
    untrained = logits(student)
    train_one_step(student)
    assert not torch.equal(logits(student), untrained)
    student.save_pretrained(folder / "one")
    loaded = load_student(folder / "one")
    for model in (loaded, load_model(folder / "one", ModelHead(PREDICTION_KINDS[family]))):
        assert type(model) is type(teacher)
        assert torch.equal(logits(model), logits(student))
    stock = getattr(transformers, PREDICTION_KINDS[family])
    if not is_unequal(student.config):
        assert torch.equal(logits(stock.from_pretrained(folder / "one")), logits(student))
    else:
        with pytest.raises(RuntimeError, match=r"per-layer attribute|size mismatch|mismatched"):
            stock.from_pretrained(folder / "one")
    loaded.save_pretrained(folder / "two")
    assert same_files(folder / "one", folder / "two")
    if family not in ENCODERS:
        assert torch.equal(generate(loaded), generate(loaded, use_cache=False))
        assert torch.equal(generate(loaded), generate(student))


def test_keeping_everything_is_the_identity(any_family, tmp_path):
    teacher = tiny_model(any_family)
    teacher.config.save_pretrained(tmp_path)  # a recipe is checked against the sizes in it, without torch
    size = teacher_size(tmp_path)
    assert (size.layers, size.width) == (len(layers_of(teacher)), mlps_of(teacher)[0].width)
    student = cut_by_hand(teacher, depths(teacher)["main"], encoder=depths(teacher).get("encoder"))
    assert torch.equal(logits(student), logits(teacher))
    assert {**student.config.to_dict(), "dtype": None} == {**teacher.config.to_dict(), "dtype": None}


def test_a_student_can_be_a_teacher(form):
    student = cut_by_hand(tiny_model(form), (0, 1, 2), (40, 16, 32))
    copied = cut_by_hand(student, range(3), None)
    assert torch.equal(logits(copied), logits(student))
    assert copied.config.to_dict() == student.config.to_dict()
    assert [mlp.width for mlp in mlps_of(cut_by_hand(student, (0, 2), None))] == [40, 32]


def test_removing_dead_neurons_leaves_logits_equal(form):
    teacher = tiny_model(form)
    with torch.no_grad():  # without outgoing weights a neuron is dead, whatever it reads
        for mlp in all_mlps(teacher):
            mlp.weight_out[..., : WIDTH // 2] = 0
    sides = depths(teacher)
    student = cut_by_hand(teacher, sides["main"], [WIDTH // 2] * len(sides["main"]), sides.get("encoder"))
    assert_close(student, teacher)


def test_the_order_of_neurons_does_not_matter(form):
    teacher = tiny_model(form)
    mixed = copy.deepcopy(teacher)
    for seed, mlp in enumerate(all_mlps(mixed)):
        draw = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(WIDTH, generator=draw) for _ in range(mlp.experts or 1)])
        for name, tensor in mlp.tensors.items():
            tensor.data = keep_units(tensor.data, mlp.axis.tensors[name], order if mlp.experts else order[0])
    assert not torch.equal(all_mlps(mixed)[0].weight_out, all_mlps(teacher)[0].weight_out)
    assert_close(mixed, teacher)


@pytest.mark.parametrize("family", [name for name in DECODERS + ENCODERS + SEQ2SEQ if name not in POST_NORM])
def test_dropping_layers_is_the_teacher_with_those_layers_silenced(family):
    teacher = tiny_model(family)
    kept = (0, 2) if layout_of(teacher).main.keep_first else (1, 2)
    student = cut_by_hand(teacher, kept)
    with torch.no_grad():  # pre-norm: a layer that adds nothing to the residual stream is not there
        for side, every in depths(teacher).items():
            for index in set(every) - set(kept):
                for name, parameter in layers_of(teacher, side)[index].named_parameters():
                    if set(name.split(".")[-2:]) & set(WRITES_TO_THE_STREAM):
                        parameter.zero_()
    assert_close(student, teacher)


def test_tied_weights_stay_tied_and_the_generation_config_stays(form, tmp_path):
    teacher = tiny_model(form)
    if form not in ENCODERS:
        teacher.generation_config.repetition_penalty = 1.3
    student = cut_by_hand(teacher, (0, 2), (40, 16))
    student.save_pretrained(tmp_path)
    shared = len(list(teacher.named_parameters(remove_duplicate=False))) - len(list(teacher.named_parameters()))
    for model in (student, load_student(tmp_path), pad_to_largest(student)):
        named = dict(model.named_parameters(remove_duplicate=False))
        assert len(named) - len(dict(model.named_parameters())) == shared
        if form not in ENCODERS:
            assert model.generation_config.repetition_penalty == 1.3


def test_the_attention_implementation_is_the_teachers_and_reaches_every_layer(form, tmp_path):
    teacher = tiny_model(form)
    cut_by_hand(teacher, (0, 2), (40, 16)).save_pretrained(tmp_path)
    if teacher._can_set_attn_implementation():
        use_eager_attention(teacher)
    assert cut_by_hand(teacher, (0, 2)).config._attn_implementation == "eager"
    student = load_student(tmp_path)
    if student._can_set_attn_implementation():
        use_eager_attention(student)
    assert {module.config._attn_implementation for module in student.modules() if hasattr(module, "config")} == {
        "eager"
    }


def test_zero_neurons_make_widths_equal_and_leave_logits(form, tmp_path):
    student = cut_by_hand(tiny_model(form), (0, 2), (40, 16))
    wide = pad_to_largest(student)
    assert not is_unequal(wide.config)
    assert_close(wide, student, atol=1e-6)
    wide.save_pretrained(tmp_path)
    again = getattr(transformers, PREDICTION_KINDS[form]).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(wide))


@pytest.mark.parametrize("rule", [{"mlp_only_layers": [1]}, {"mlp_only_layers": [], "decoder_sparse_step": 2}])
def test_dense_layers_among_experts_stay_what_they_are(rule, tmp_path):
    teacher = tiny_model("qwen3_moe", intermediate_size=64, **rule)
    dense = [mlp.experts is None for mlp in mlps_of(teacher)]
    assert True in dense and False in dense
    for kept in ((1, 2), (0, 3), (1, 3), (2, 3)):
        student = cut_by_hand(teacher, kept, None)
        assert [mlp.experts is None for mlp in mlps_of(student)] == [dense[index] for index in kept]
        student.save_pretrained(tmp_path / str(kept))
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(kept))
        assert torch.equal(logits(again), logits(student))


def test_a_layer_that_cannot_go_is_named():
    with pytest.raises(InputError, match=r"student\.layers\.keep: layer 0 must be kept.*ModernBERT"):
        cut_by_hand(tiny_model("modernbert"), (1, 2))
    teacher = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert len(layers_of(cut_by_hand(teacher, (0, 1)))) == 2
    with pytest.raises(InputError, match="only the last layers can be dropped"):
        cut_by_hand(teacher, (0, 2))


def test_a_null_width_is_four_times_the_hidden_size(tmp_path):
    teacher = tiny_model("gpt2", n_inner=None)
    student = cut_by_hand(teacher, (0, 2), (128, 64))
    student.save_pretrained(tmp_path)
    assert [mlp.width for mlp in mlps_of(load_student(tmp_path))] == [128, 64]
    assert cut_by_hand(teacher, (0, 2), None).config.n_inner is None


@pytest.mark.parametrize("family", NO_ROW)
def test_a_family_without_a_row_is_found_by_its_structure(family, tmp_path):
    teacher = tiny_model(family)
    student = cut_by_hand(teacher, (1, 2), (40, 16))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.save_pretrained(tmp_path)
    _detected.clear()
    loaded = load_student(tmp_path)
    assert [mlp.width for mlp in mlps_of(loaded)] == [40, 16]
    assert torch.equal(logits(loaded), logits(student))
    assert torch.equal(generate(loaded), generate(loaded, use_cache=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert_close(pad_to_largest(student), student, atol=1e-6)
    outs = {*WRITES_TO_THE_STREAM, layout_of(teacher).main.mlps[0].out.rpartition(".")[2]}
    with torch.no_grad():
        for index in (0, 3):  # these are pre-norm families
            for name, parameter in layers_of(teacher)[index].named_parameters():
                if set(name.split(".")[-2:]) & outs:
                    parameter.zero_()
    assert_close(cut_by_hand(teacher, (1, 2)), teacher)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]]}, "built differently"),
        ("diffllama", {"num_key_value_heads": 2}, "built differently"),  # has constants that depend on the index
        ("bitnet", {"num_key_value_heads": 2}, "1 groups .* 0 compute like one"),  # has a norm over its neurons
        ("olmoe", {"num_key_value_heads": 2, "num_experts": 4}, "0 groups"),
        ("bloom", {}, "0 groups"),
        ("mamba", {}, "cannot be built smaller"),
    ],
)
def test_a_family_that_is_not_understood_is_refused(family, changes, words):
    own = {"gpt_neo": {"num_layers": 4, "num_heads": 4}, "bloom": {"n_layer": 4, "n_head": 4}}
    sizes = SIZES if family not in own else {"vocab_size": 64, "hidden_size": 32, **own[family]}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**sizes, **special, **changes})
    with pytest.raises(InputError, match=rf"{family}.*{words}.*LAYOUTS in distill/models/layout\.py"):
        layers_of(transformers.AutoModelForCausalLM.from_config(config))


def test_an_encoder_decoder_without_a_row_is_refused():
    model = transformers.AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("blenderbot", **OWN_SIZES["bart"]))
    with pytest.raises(InputError, match=r"blenderbot.*encoder-decoder"):
        layers_of(model)


def test_all_rows_of_the_layout_are_tested():
    assert {family.removesuffix("-gated") for family in DECODERS + ENCODERS + SEQ2SEQ} == set(LAYOUTS)


def test_units_of_several_entries_are_kept_padded_summed_and_spread_by_hand():
    # Two groups of three units of two entries each: a0 a0 a1 a1 a2 a2 | b0 b0 b1 b1 b2 b2.
    rows = torch.tensor([1.0, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50, 60])
    place, tensor = UnitDim(1, fused=2, block=2), torch.stack([rows, -rows])
    kept = keep_units(tensor, place, torch.tensor([0, 2]))
    assert kept[0].tolist() == [1, 2, 5, 6, 10, 20, 50, 60] and torch.equal(kept[1], -kept[0])
    assert pad_units(kept, place, 3)[0].tolist() == [1, 2, 5, 6, 0, 0, 10, 20, 50, 60, 0, 0]
    assert sum_per_unit(tensor[:1], place, per_expert=False).tolist() == [33, 77, 121]
    assert sum_per_unit(tensor, place, per_expert=True).tolist() == [[33, 77, 121], [-33, -77, -121]]
    spread = spread_units(torch.tensor([True, False, True]), place, tensor.shape)
    assert spread.tolist() == [[True, True, False, False, True, True] * 2] * 2
    each = spread_units(torch.tensor([[1, 0, 0], [0, 0, 1]]), place, tensor.shape)
    assert each.tolist() == [[1, 1, 0, 0, 0, 0] * 2, [0, 0, 0, 0, 1, 1] * 2]
    experts = keep_units(tensor, place, torch.tensor([[1], [2]]))
    assert experts.tolist() == [[3, 4, 30, 40], [-5, -6, -50, -60]]
