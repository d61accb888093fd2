"""Recipes with one mistake each: what is changed in a good recipe, and what the message must say about it."""

from __future__ import annotations

import re
from typing import NamedTuple

GOOD = """\
name: tiny
seed: 0
teacher:
  model: ./teacher
  fit: {epochs: 2, lr: 2e-4}
student:
  layers: {keep: 3, choose: even}
  mlp: {keep: 0.5, score: activation, multiple_of: 64}
data:
  source: stdlib-docstrings
  task: classification
  labelled: 160
losses:
  - {match: labels, weight: 0.3}
  - {match: logits, loss: jsd, temperature: 2.0, params: {beta: 0.5}}
  - {match: hidden, loss: mse, map: plan}
training:
  epochs: 3
  batch_size: 32
  lr: 3e-4
evaluation:
  metrics: [accuracy, f1_macro]
  arms: [teacher, cut, distilled]
release: {license: apache-2.0}
"""
"""The teacher beside it has 6 layers and an MLP of 1536."""


class Bad(NamedTuple):
    """One mistake: `old` becomes `new` in the good recipe, and one problem says so."""

    old: str
    new: str
    line: int
    key: str
    words: str
    """Must appear in the problem, in this order."""

    @property
    def text(self) -> str:
        assert GOOD.count(self.old) == 1, f"{self.old!r} must be in the good recipe once"
        return GOOD.replace(self.old, self.new)


UNKNOWN_KEYS = [
    Bad("seed: 0", "sed: 0", 2, "sed", "unknown key did you mean 'seed'"),
    Bad("seed: 0", "Seed: 0", 2, "Seed", "unknown key did you mean 'seed'"),
    Bad("training:", "trainning:", 17, "trainning", "unknown key did you mean 'training'"),
    Bad("losses:", "loss:", 13, "loss", "unknown key did you mean 'losses'"),
    Bad("  labelled: 160", "  labeled: 160", 12, "data.labeled", "unknown key did you mean 'labelled'"),
    Bad("  batch_size: 32", "  batch-size: 32", 19, "training.batch-size", "did you mean 'batch_size'"),
    Bad("lr: 2e-4}", "learning_rate: 2e-4}", 5, "teacher.fit.learning_rate", "unknown key did you mean 'lr'"),
    Bad("keep: 3,", "kep: 3,", 7, "student.layers.kep", "did you mean 'keep'"),
    Bad("multiple_of", "multipleof", 8, "student.mlp.multipleof", "did you mean 'multiple_of'"),
    Bad("weight: 0.3", "wieght: 0.3", 14, "losses.0.wieght", "did you mean 'weight'"),
    Bad("license:", "licence:", 24, "release.licence", "did you mean 'license'"),
    Bad("seed: 0", "seed: 0\nlr: 3e-4", 3, "lr", "unknown key belongs under training: or under teacher.fit:"),
    Bad("  labelled: 160", "  score: activation", 12, "data.score", "belongs under student.mlp:"),
    Bad("  lr: 3e-4", "  max_length: 64", 20, "training.max_length", "belongs under data:"),
    Bad("  lr: 3e-4", "  temperature: 2", 20, "training.temperature", "belongs in an item of losses:"),
    Bad("seed: 0", "extends: ../other.yaml", 2, "extends", "unknown key remove it name, seed, teacher"),
    Bad("  lr: 3e-4", "  epoch: 3", 20, "training.epoch", "did you mean 'epochs'? It is given as well"),
    Bad("map: plan", "map: plan, 'on': 1", 16, "losses.2.on", "unknown key"),
    Bad("seed: 0", "\u0455eed: 0", 2, "\u0455eed", "unknown key did you mean 'seed'"),  # a Cyrillic s
]

WRONG_VALUES = [
    Bad("name: tiny", "name: -tiny", 1, "name", 'letters, digits starting with got the text "-tiny"'),
    Bad("name: tiny", "name: 12", 1, "name", 'expected text got the number 12 write "12"'),
    Bad("name: tiny", "name: runs/tiny", 1, "name", "letters, digits"),
    Bad("name: tiny\n", "", 1, "name", "missing"),
    Bad("seed: 0", "seed: -1", 2, "seed", "at least 0 got the number -1"),
    Bad("seed: 0", "seed: true", 2, "seed", "a whole number got true"),
    Bad("  model: ./teacher\n", "", 3, "teacher.model", "missing; give text"),
    Bad("fit: {epochs: 2, lr: 2e-4}", "fit: 3", 5, "teacher.fit", "a section with the keys epochs got the number 3"),
    Bad("fit: {epochs: 2,", "sha256: abc\n  fit: {epochs: 2,", 5, "teacher.sha256", "64 hexadecimal digits"),
    Bad("fit: {epochs: 2,", "init: rand\n  fit: {epochs: 2,", 5, "teacher.init", "did you mean 'random'"),
    Bad("keep: 3,", "keep: 0,", 7, "student.layers.keep", "at least 1 or a list got the number 0"),
    Bad("keep: 3,", "keep: three,", 7, "student.layers.keep", 'a whole number or a list got the text "three"'),
    Bad("keep: 3,", "keep: [0, -1],", 7, "student.layers.keep.1", "at least 0 got the number -1"),
    Bad("keep: 3, choose: even", "keep: 3.0", 7, "student.layers.keep", "got the number 3.0 write 3"),
    Bad("keep: 0.5", "keep: 1.5", 8, "student.mlp.keep", "at most 1 got the number 1.5"),
    Bad("keep: 0.5", "keep: 0", 8, "student.mlp.keep", "got the number 0"),
    Bad("keep: 0.5", "keep: true", 8, "student.mlp.keep", "got true"),
    Bad("multiple_of: 64", "multiple_of: 0", 8, "student.mlp.multiple_of", "at least 1"),
    Bad("labelled: 160", 'labelled: "160"', 12, "data.labelled", 'got the text "160" write 160'),
    Bad("labelled: 160", "labelled: ~\n  max_length: ~", 13, "data.max_length", "got null"),
    Bad("labelled: 160", "test_share: 1.0", 12, "data.test_share", "below 1 got the number 1.0"),
    Bad("labelled: 160", "labelled: 12:30:00", 12, "data.labelled", 'got the text "12:30:00"'),
    Bad("labelled: 160", "limit: [1]", 12, "data.limit", "got the list [1]"),
    Bad("match: labels,", "match: label,", 14, "losses.0.match", "one of labels, logits, hidden did you mean 'labels'"),
    Bad("{match: labels, weight: 0.3}", "{weight: 0.3}", 14, "losses.0.match", "missing; give one of labels"),
    Bad("{match: labels, weight: 0.3}", "labels", 14, "losses.0", 'a section with the keys got the text "labels"'),
    Bad("weight: 0.3", "weight: -1", 14, "losses.0.weight", "at least 0 got the number -1"),
    Bad("weight: 0.3", "weight: .nan", 14, "losses.0.weight", "a number got the number .nan"),
    Bad("weight: 0.3", "weight: .inf", 14, "losses.0.weight", "a number got the number .inf"),
    Bad("temperature: 2.0,", "temperature: 0,", 15, "losses.1.temperature", "above 0"),
    Bad("{beta: 0.5}", "{beta: [1]}", 15, "losses.1.params.beta", "got the list [1]"),
    Bad("{beta: 0.5}", "{beta: {}}", 15, "losses.1.params.beta", "got the section {}"),
    Bad("map: plan", "schedule: {weight: -1}", 16, "losses.2.schedule.weight", "at least 0 got the number -1"),
    Bad("map: plan", "map: plane", 16, "losses.2.map", "did you mean 'plan'"),
    Bad("map: plan", "map: [[0, 1], [1]]", 16, "losses.2.map.1", "expected more items got the list [1]"),
    Bad("map: plan", "map: [[0, 1], [1, x]]", 16, "losses.2.map.1.1", 'got the text "x"'),
    Bad("  lr: 3e-4", "  lr: fast", 20, "training.lr", 'expected a number, got the text "fast"'),
    Bad("  lr: 3e-4", "  lr: true", 20, "training.lr", "expected a number, got true"),
    Bad("  lr: 3e-4", "  lr: ${LR}", 20, "training.lr", 'got the text "${LR}"'),
    Bad("  lr: 3e-4", "  betas: [0.9]", 20, "training.betas", "expected more items got the list [0.9]"),
    Bad("  lr: 3e-4", "  schedule: cosin", 20, "training.schedule", "did you mean 'cosine'"),
    Bad("  lr: 3e-4", "  lr: 1e999", 20, "training.lr", "got the number .inf"),
    Bad("arms: [teacher, cut,", "arms: [teacher, cuts,", 23, "evaluation.arms.1", "did you mean 'cut'"),
    Bad("arms: [teacher", "efficiency: yes\n  arms: [teacher", 23, "evaluation.efficiency", "true or false write true"),
    Bad("  metrics: [accuracy, f1_macro]", "  metrics: accuracy", 22, "evaluation.metrics", "a list got the text"),
    Bad("{license: apache-2.0}", "{license: 2}", 24, "release.license", "expected text or null, got the number 2"),
    Bad(
        "{license: apache-2.0}",
        "{also: [gguf], format: native}",
        24,
        "release.also",
        "gguf has one MLP width format: native is for different ones format: padded onnx or ctranslate2",
    ),
    Bad("{license: apache-2.0}", "", 24, "release", "a section with the keys format got null"),
]


def _mask(given: str, line_key: str, words: str) -> Bad:
    return Bad("multiple_of: 64}", f"multiple_of: 64}}\n  mask: {{{given}}}", 9, f"student.mask{line_key}", words)


MASKS = [
    _mask("per: neuron", "", "none of sparsity and threshold is given add one"),
    _mask("sparsity: 0.5, threshold: 1", ".threshold", "both given remove one"),
    _mask("sparsity: 1.0", ".sparsity", "below 1 got the number 1.0"),
    _mask("sparsity: 0.5, per: neurons", ".per", "one of weight, neuron did you mean 'neuron'"),
    _mask("threshold: 0.5, score: random", ".threshold", "no meaning with score: random give sparsity"),
    _mask("sparsity: 0.5, every: 5", ".every", "no effect with schedule: one_shot schedule: cubic"),
    _mask("sparsity: 0.5, end: 0.5", ".end", "no effect with schedule: one_shot"),
    _mask("sparsity: 0.5, schedule: cubic, begin: 0.8", ".begin", "0.8 of the steps 0.75 begin before"),
    _mask("sparsity: 0.5, begin: 40", ".begin", "at most 1 got the number 40"),
    _mask("sparsity: 0.5, compact: true", ".compact", "release.format uniform write compact: uniform"),
    _mask("sparsity: 0.5, compact: unifrom", ".compact", "uniform or true or false did you mean 'uniform'"),
    _mask("sparsity: 0.5, score: magnitudes", ".score", "one of magnitude, random did you mean 'magnitude'"),
    _mask("sparsity: 0.5, score: random, params: {sed: 1}", ".params.sed", "did you mean 'seed'"),
]

CROSS_CHECKS = [
    Bad("  lr: 3e-4", "  tokens: 1000", 20, "training.tokens", "epochs and tokens are both given remove one"),
    Bad("  lr: 3e-4", "  decay: 0.1", 20, "training.decay", "no effect with schedule: cosine for schedule: wsd"),
    Bad("lr: 2e-4}", "decay: 5}", 5, "teacher.fit.decay", "no effect with schedule: cosine for schedule: wsd"),
    Bad("  lr: 3e-4", "  betas: [0.8, 0.9]\n  optimizer: mine:sgd", 20, "training.betas", "no effect optimizer: adamw"),
    Bad("  lr: 3e-4", "  weights: bf16", 20, "training.weights", "precision is fp32 write precision: bf16"),
    Bad("lr: 2e-4}", "lr: 2e-4, weights: bf16}", 5, "teacher.fit.weights", "precision is fp32 write precision: bf16"),
    Bad(
        "  lr: 3e-4",
        "  weights: bf16\n  precision: bf16\n  optimizer: mine:sgd",
        20,
        "training.weights",
        "mine:sgd keeps no fp32 masters write optimizer: adamw or adamw_8bit",
    ),
    Bad("  lr: 3e-4", '  freeze: ["*norm*"]\n  lora: {}', 20, "training.freeze", "no effect beside lora remove it"),
    Bad("lr: 2e-4}", 'lr: 2e-4, lora: {}, only: ["*mlp*"]}', 5, "teacher.fit.only", "no effect beside lora"),
    Bad("  lr: 3e-4", "  lora: {rank: 0}", 20, "training.lora.rank", "got 0"),
    Bad("  lr: 3e-4", "  lora: {targets: []}", 20, "training.lora.targets", "all-linear or more items"),
    Bad(
        "fit: {epochs: 2, lr: 2e-4}",
        "init: random\n  fit: {epochs: 2, lora: {}}",
        6,
        "teacher.fit.lora",
        "random weights remove it all weights must learn",
    ),
    Bad("  lr: 3e-4", "  optimizer: adamw_8bits", 20, "training.optimizer", "adamw_8bit"),
    Bad("  lr: 3e-4", "  ema_release: true", 20, "training.ema_release", "no average add ema: 0.999"),
    Bad("  lr: 3e-4", "  keep_best: accuracy", 20, "training.keep_best", "evaluate_every is 0"),
    Bad(
        "hidden, loss: mse, map: plan}\ntraining:",
        "relations}\ntraining:\n  compile: true",
        16,
        "losses.2.match",
        "reads inside of layers remove training.compile",
    ),
    Bad("./teacher", "./teacher\n  dtype: fp8\n  device: cpu", 5, "teacher.dtype", "fp8 needs the GPU device: same"),
    Bad("./teacher", "./teacher\n  fp8_max_kl: 0.1", 5, "teacher.fp8_max_kl", "has no effect with dtype: stored"),
    Bad("./teacher", "./teacher\n  dtype: int8\n  device: cpu", 5, "teacher.dtype", "int8 needs the GPU device: same"),
    Bad("./teacher", "./teachr", 4, "teacher.model", "there is no folder"),
    Bad("./teacher", "./empty", 4, "teacher.model", "config.json No such file"),
    Bad("./teacher", "./broken", 4, "teacher.model", "config.json"),
    Bad("./teacher", "teacher", 4, "teacher.model", "neither nor a hub id ORG/NAME; write ./teacher"),
    Bad("./teacher", "./" + "x" * 5000, 4, "teacher.model", "there is no folder"),
    Bad("./teacher", "org/na/me", 4, "teacher.model", "neither"),
    Bad("./teacher", "org/model", 4, "teacher.model", "ambiguous write ./org/model"),
    Bad("./teacher", "package:no_such_package/model", 4, "teacher.model", "not installed pip install no_such_package"),
    Bad("./teacher", "package:json/../model", 4, "teacher.model", "not of the form package:NAME/SUBFOLDER"),
    Bad("./teacher", "package:json/model", 4, "teacher.model", "there is no folder"),
    Bad("./teacher", "package:ast/model", 4, "teacher.model", "single module"),
    Bad("./teacher", "./teacher\n  revision: abc", 5, "teacher.revision", "only hub ids have revisions"),
    Bad("fit: {epochs: 2, lr: 2e-4}", "init: random", 5, "teacher.init", "nothing to teach add `fit:"),
    Bad("{epochs: 2,", "{epochs: 2, steps: 9,", 5, "teacher.fit.steps", "epochs and steps are both given remove one"),
    Bad("{epochs: 2, ", "{", 5, "teacher.fit", "none of epochs, steps and tokens"),
    Bad("  epochs: 3\n", "", 17, "training", "none of epochs, steps and tokens is given add one"),
    Bad("  epochs: 3\n", "  epochs: null\n", 17, "training", "none of epochs, steps and tokens"),
    Bad("  lr: 3e-4", "  micro_batch_size: 5", 20, "training.micro_batch_size", "32 is not a multiple for example 4"),
    Bad("keep: 3,", "keep: 7,", 7, "student.layers.keep", "keeps 7 layers, the teacher has 6 1 to 6"),
    Bad("keep: 3, choose: even", "keep: [0, 6]", 7, "student.layers.keep.1", "no layer 6 0 to 5"),
    Bad("keep: 3, choose: even", "keep: [0, 2, 2]", 7, "student.layers.keep.2", "layer 2 is listed twice"),
    Bad("keep: 3, choose: even", "keep: [2, 0]", 7, "student.layers.keep.1", "ascending write [0, 2]"),
    Bad("keep: 3, choose: even", "keep: []", 7, "student.layers.keep", "names no layer"),
    Bad("keep: 3, choose: even", "keep: [0, 2], choose: last", 7, "student.layers.choose", "has no effect"),
    Bad("labelled: 160", "max_length: 600", 12, "data.max_length", "600 tokens per example, the teacher has 512"),
    Bad("keep: 0.5", "keep: 1600", 8, "student.mlp.keep", "1600 neurons, the teacher's MLP has 1536"),
    Bad("keep: 0.5", "keep: 63", 8, "student.mlp.keep", "63 of 1536 multiple of 64 leaves none at least 64"),
    Bad("keep: 0.5", "keep: 0.01", 8, "student.mlp.keep", "15 of 1536 leaves none lower multiple_of"),
    Bad(
        "multiple_of: 64}",
        "multiple_of: 64}\n  repair: {ridge: 0}",
        9,
        "student.repair.ridge",
        "no effect refit or merge",
    ),
    Bad(
        "multiple_of: 64}", "multiple_of: 64}\n  repair: {held_out: 9}", 9, "student.repair.held_out", "no effect bias"
    ),
    Bad(
        "keep: 0.5, score: activation, multiple_of: 64}",
        "keep: 1.0}\n  repair: {refit: true}",
        9,
        "student.repair.refit",
        "no effect no neuron is removed",
    ),
    Bad(
        "keep: 3, choose: even}", "keep: 6}\n  repair: {merge: true}", 8, "student.repair.merge", "drops no layer fewer"
    ),
    Bad("[teacher, cut,", "[teacher, repaired,", 23, "evaluation.arms.1", "nothing is repaired ask for student.repair"),
    Bad("weight: 0.3}", "weight: 0.3, loss: jsd}", 14, "losses.0.loss", "no effect with match: labels match: logits"),
    Bad("weight: 0.3}", "temperature: 2}", 14, "losses.0.temperature", "no effect with match: labels"),
    Bad("weight: 0.3}", "map: last}", 14, "losses.0.map", "no effect with match: labels match: hidden"),
    Bad("weight: 0.3}", "params: {beta: 1}}", 14, "losses.0.params", "no effect with match: labels"),
    Bad("temperature: 2.0,", "map: last,", 15, "losses.1.map", "no effect with match: logits"),
    Bad("map: plan", "temperature: 2", 16, "losses.2.temperature", "no effect with match: hidden"),
    Bad("map: plan", "stack: encoder", 16, "losses.2.stack", "no effect not an encoder-decoder"),
    Bad("weight: 0.3}", "stack: encoder}", 14, "losses.0.stack", "no effect with match: labels match: hidden"),
    Bad("map: plan", "map: []", 16, "losses.2.map", "maps no layer"),
    Bad("map: plan", "map: [[3, 5]]", 16, "losses.2.map.0", "the student has no layer 3 0 to 2"),
    Bad("map: plan", "map: [[0, 6]]", 16, "losses.2.map.0", "the teacher has no layer 6 0 to 5"),
    Bad("map: plan", "map: [[0, 1], [0, 1]]", 16, "losses.2.map.1", "listed twice"),
    Bad("labelled: 160", "also: {b: ./a.csv}", 12, "data.also", "unknown key write sets: {NAME: …} under evaluation:"),
    Bad(
        "arms: [teacher, cut, distilled]",
        "sets: {b: {source: ./texts.csv, weight: 2}}",
        23,
        "evaluation.sets.b.weight",
        "training rows only",
    ),
    Bad("arms: [teacher, cut, distilled]", "sets: {b: ./no.csv}", 23, "evaluation.sets.b", "no.csv"),
    Bad("labelled: 160", "text: body", 12, "data.text", "unknown key write columns: {text: COLUMN} under data:"),
    Bad("labelled: 160", "columns: {text: label}", 12, "data.columns.text", "label is the column of label as well"),
    Bad("labelled: 160", "columns: {pair: text}", 12, "data.columns.pair", "text is the column of text as well"),
    Bad("labelled: 160", "columns: {txt: body}", 12, "data.columns.txt", "no column txt did you mean 'text'"),
    Bad("labelled: 160", "columns: {text: body}", 12, "data.columns.text", "has no column 'body' 'text', 'label'"),
    Bad(
        "stdlib-docstrings", "{source: pydoc-topics, split: a}", 10, "data.source.split", "only hub datasets and saved"
    ),
    Bad("stdlib-docstrings", "{source: ./texts.csv, config: a}", 10, "data.source.config", "only hub datasets have it"),
    Bad(
        "stdlib-docstrings",
        '{source: ./x.txt, separator: "\\n\\n"}',
        10,
        "data.source.separator",
        "expected a line without a line break",
    ),
    Bad("stdlib-docstrings", "./texts.csv\n  train: ./texts.csv", 11, "data.train", "source and train are both given"),
    Bad("labelled: 160", "test: [{source: ./a.csv, weight: 2}]", 12, "data.test.0.weight", "training rows only"),
    Bad("labelled: 160", "test: ./texts.csv\n  test_share: 0.3", 13, "data.test_share", "no effect: test is given"),
    Bad("labelled: 160", "classes: [a, b, a]", 12, "data.classes.2", "the class a is listed twice"),
    Bad(
        "classification\n  labelled: 160",
        "token_classification\n  columns: {tags: a, spans: b}",
        12,
        "data.columns",
        "two forms, tokens, tags and text, spans",
    ),
    *MASKS,
    Bad("[teacher, cut,", "[teacher, teacher,", 23, "evaluation.arms.1", "teacher is listed twice"),
    Bad("f1_macro]", "accuracy]", 22, "evaluation.metrics.1", "accuracy is listed twice"),
]

MLP = "keep: 0.5, score: activation, multiple_of: 64"

STUDENT = [
    Bad(
        "choose: even",
        "choose: random, protect_first: 4",
        7,
        "student.layers.protect_first",
        "4 layers only 3 are kept",
    ),
    Bad(
        "choose: even", "choose: even, protect_last: 1", 7, "student.layers.protect_last", "no effect with choose: even"
    ),
    Bad("keep: 3, choose: even", "keep: 4, choose: every", 7, "student.layers.keep", "divides 6 layers 4 1, 2, 3, 6"),
    Bad("keep: 3, choose: even", "keep: [0, 2], protect_last: 1", 7, "student.layers.protect_last", "has no effect"),
    Bad("  mlp: {", "  encoder_layers: {keep: 2}\n  mlp: {", 8, "student.encoder_layers", "not an encoder-decoder"),
    Bad("keep: 0.5", "keep: [0.5, 0.5]", 8, "student.mlp.keep", "2 widths for 3 kept layers"),
    Bad("keep: 0.5", "keep: [64, 64, 128]", 8, "student.mlp.keep", "different widths uniform native or padded"),
    Bad("keep: 0.5", "keep: [0.5, 0.5, 0]", 8, "student.mlp.keep.2", "above 0"),
    Bad("keep: 0.5", "allocate: global, keep: [64, 64, 64]", 8, "student.mlp.allocate", "has no effect lists a width"),
    Bad("keep: 0.5", "keep: 0.5, floor: 0.6", 8, "student.mlp.keep", "768 of 1536 is less than the floor of 960"),
    Bad("keep: 0.5", "keep: 1.0, protect: [6]", 8, "student.mlp.protect.0", "no layer 6 0 to 5"),
    Bad("keep: 0.5", "keep: 1.0, protect: [1, 1]", 8, "student.mlp.protect.1", "listed twice"),
    Bad("keep: 0.5", "keep: 0.5, protect: [1]", 8, "student.mlp.protect", "uniform has one width native or padded"),
    Bad("keep: 0.5", "keep: 0.5, allocate: global", 8, "student.mlp.allocate", "global uniform native or padded"),
    Bad(MLP, "allocate: sensitivity", 8, "student.mlp.allocate", "sensitivity different widths native or padded"),
    Bad("activation,", "taylor, params: {norm: 1},", 8, "student.mlp.params.norm", "taylor has no such parameter"),
    Bad(
        MLP + "}", "score: wanda}\n  target: {}", 9, "student.target", "none of parameters, flops and latency is given"
    ),
    Bad(MLP + "}", "score: wanda}\n  target: {flops: 1.5}", 9, "student.target.flops", "at most 1"),
    Bad(
        MLP + "}",
        "score: wanda}\n  target: {flops: 0.5, parameters: 0.5}",
        9,
        "student.target.flops",
        "parameters and flops are both given",
    ),
    Bad(MLP + "}", "score: wanda}\n  target: {parameters: 9, length: 9}", 9, "student.target.length", "no effect"),
    Bad("64}", "64}\n  target: {latency: 0.5}", 8, "student.mlp.keep", "student.target says how much is kept"),
    Bad(
        "score: activation, multiple_of: 64}",
        "score: fisher}\n  calibration: {gradients: false}",
        9,
        "student.calibration.gradients",
        "fisher reads what this switches off",
    ),
    Bad(
        "score: activation, multiple_of: 64}",
        "score: output_change}\n  calibration: {gram: false}",
        9,
        "student.calibration.gram",
        "output_change reads what this switches off",
    ),
    Bad(
        "choose: even", "choose: random, params: {protected: 1}", 7, "student.layers.params.protected", "protect_first"
    ),
]
"""Rules about the student."""

STRATEGIES = [
    Bad(
        "  lr: 3e-4",
        "  optimizer: adam",
        20,
        "training.optimizer",
        "expected adamw or package.module:function did you mean 'adamw'",
    ),
    Bad("  lr: 3e-4", "  optimizer_params: {esp: 1e-6}", 20, "training.optimizer_params.esp", "did you mean 'eps'"),
    Bad("  lr: 3e-4", "  optimizer_params: {lr: 1e-6}", 20, "training.optimizer_params.lr", "key of its own"),
    Bad(
        "  lr: 3e-4",
        "  optimizer: torch.optim:SGD\n  optimizer_params: {lr: 0.1}",
        21,
        "training.optimizer_params.lr",
        "a key of its own write `lr:`",
    ),
    Bad("even", "mine:f, params: {protected: 1}", 7, "student.layers.params.protected", "key of its own protect_first"),
    Bad("even", "evn", 7, "student.layers.choose", "one of even block_influence did you mean 'even'"),
    Bad("even", "even, params: {sed: 1}", 7, "student.layers.params.sed", "even has no such parameter"),
    Bad("even", "random, params: {sed: 1}", 7, "student.layers.params.sed", "did you mean 'seed'"),
    Bad(
        "activation",
        "activations",
        8,
        "student.mlp.score",
        "one of activation, activation_l2 did you mean 'activation'",
    ),
    Bad("activation", "magnitude, allocate: uniforms", 8, "student.mlp.allocate", "did you mean 'uniform'"),
    Bad(
        MLP, "allocate: uniform, allocate_params: {mass: 1}", 8, "student.mlp.allocate_params.mass", "no such parameter"
    ),
    Bad("activation", "random, params: {seeds: 1}", 8, "student.mlp.params.seeds", "did you mean 'seed'"),
    Bad(
        "stdlib-docstrings",
        "stdlib_docs",
        10,
        "data.source",
        "one of stdlib-docstrings ./FILE did you mean 'stdlib-docstrings'",
    ),
    Bad(
        "classification",
        "clasification",
        11,
        "data.task",
        "one of classification, causal_lm, question_answering, relation_extraction did you mean 'classification'",
    ),
    Bad("jsd, temperature: 2.0,", "jds,", 15, "losses.1.loss", "match: logits has no loss 'jds' did you mean 'jsd'"),
    Bad("{beta: 0.5}", "{bta: 0.5}", 15, "losses.1.params.bta", "jsd has no such parameter did you mean 'beta'"),
    Bad("{beta: 0.5}", "{temperature: 2}", 15, "losses.1.params.temperature", "a key of its own beside `params:`"),
    Bad("mse", "kl", 16, "losses.2.loss", "match: hidden has no loss 'kl' The options are mse"),
    Bad("mse", "mse, params: {p: 1}", 16, "losses.2.params.p", "mse has no such parameter remove it"),
    Bad("f1_macro", "f2", 22, "evaluation.metrics.1", "one of accuracy"),
    Bad("mse", "mine:losses:huber", 16, "losses.2.loss", "has no loss The options are mse"),
]

TERMS = [
    Bad("mse, map", "mze, map", 16, "losses.2.loss", "has no loss 'mze' did you mean 'mse'"),
    Bad("hidden, loss: mse", "relations, loss: qv", 16, "losses.2.loss", "has no loss 'qv' did you mean 'qkv'"),
    Bad("hidden, loss: mse", "attention, loss: qkv", 16, "losses.2.loss", "has no loss The options are kl, mse"),
    Bad("loss: mse, map: plan", "schedule: {}", 16, "losses.2.schedule", "changes nothing give the weight"),
    Bad("map: plan", "schedule: {temperature: 2}", 16, "losses.2.schedule.temperature", "no effect with match: hidden"),
    Bad("map: plan", "schedule: {weight: 0, start: 0.5, end: 0.1}", 16, "losses.2.schedule.start", "after end 0.1"),
    Bad("{beta: 0.5}", "{beta: half}", 15, "losses.1.params.beta", "expected a number, got 'half'"),
    Bad("map: plan", "schedule: {params: {x: 2}}", 16, "losses.2.schedule.params.x", "a number to start from"),
    Bad("hidden, loss: mse, map: plan", "embeddings, map: last", 16, "losses.2.map", "no effect match: embeddings"),
]

SYNTAX = [
    Bad("seed: 0", "seed: 0\nseed: 1", 3, "seed", "given twice first on line 2"),
    Bad("keep: 3,", "keep: 3, keep: 3,", 7, "student.layers.keep", "given twice first on line 7"),
    Bad("seed: 0", "seed: &x 0", 2, "seed", "the anchor &x is not allowed"),
    Bad("seed: 0", "seed: *x", 2, "seed", "the alias *x is not allowed"),
    Bad("seed: 0", "<<: {seed: 0}", 2, "recipe", "merge key"),
    Bad("seed: 0", "seed: !!int 0", 2, "seed", "the tag not allowed"),
    Bad("seed: 0", "seed: !!python/object/apply:os.system [ls]", 2, "seed", "the tag not allowed"),
    Bad("seed: 0", "? [seed]\n: 0", 2, "recipe", "a key must be plain text"),
    Bad("seed: 0", "seed:\t0\n\tx: 1", 2, "recipe", "a tab spaces"),
    Bad("  epochs: 3", "\tepochs: 3", 18, "recipe", "a tab spaces"),
    Bad("seed: 0", "seed: a: b", 2, "recipe", "not valid YAML quotes"),
    Bad("training:", "    training:", 17, "recipe", "indented unlike those above section"),
    Bad("  batch_size: 32", "   batch_size: 32", 19, "recipe", "not valid YAML indentation"),
    Bad("{license: apache-2.0}", "{license: apache-2.0", 25, "recipe", "not valid YAML"),
    Bad("name: tiny", "name: 'tiny", 25, "recipe", "not valid YAML"),
    Bad("name: tiny", "name: @tiny", 1, "recipe", "not valid YAML"),
    Bad("name: tiny", 'name: "ti\\0ny"', 1, "name", "control character U+0000"),
    Bad("name: tiny", 'name: "\\ud800"', 1, "name", "character U+D800"),
    Bad("name: tiny", 'name: "\\UFFFFFFFF"', 1, "recipe", "not valid YAML escapes"),
    Bad("seed: 0", "seed: \x00", 2, "recipe", "U+0000 is not allowed"),
    Bad("seed: 0", "seed: 0\n---", 3, "recipe", "a second document"),
    Bad("name: tiny", "%YAML 1.1\n---\nname: tiny", 2, "recipe", "directives are not allowed"),
    Bad("seed: 0", "seed: " + "[" * 5000, 2, "seed", "nested more than 32 levels"),
    Bad("seed: 0", "seed: " + "{a: " * 5000, 2, "seed", "nested more than 32 levels"),
    Bad("seed: 0", "seed: [" + "1, " * 30000 + "1]", 2, "seed", "more than 20,000 values"),
]

WHOLE_FILES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 1, "the file is empty"),
    ("comment only", b"# nothing\n", 1, "the file is empty"),
    ("list at top", b"- name: tiny\n- seed: 0\n", 1, "a recipe is a section of keys"),
    ("text at top", b"tiny\n", 1, "a recipe is a section of keys"),
    ("null at top", b"\n~\n", 2, "a recipe is a section of keys"),
    ("not UTF-8", b"name: tiny\nseed: \xff\n", 2, "byte 0xff is not UTF-8"),
    ("UTF-16", "name: tiny\n".encode("utf-16"), 1, "is not UTF-8"),
    ("NUL", b"name: tiny\r\nseed: \x00\r\n", 2, "U+0000 is not allowed"),
    ("huge", b"# " + b"x" * 1_100_000, 1, "larger than 1,000,000 bytes"),
    (
        "alias bomb",
        b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i, i, i - 1, i - 1) for i in range(98, 123)),
        1,
        "the anchor &a is not allowed",
    ),
]
"""(what, bytes, line, words)"""


def says(text: str, words: str) -> bool:
    """Whether the words stand in the text in this order, with anything between them."""
    return re.search(".*".join(map(re.escape, words.split())), text, re.DOTALL) is not None
