"""Training in less memory: bf16 weights with fp32 masters, adapters, moments of 8 bits."""

from __future__ import annotations

import shutil

import torch
from running import published, run
from safetensors.torch import load_file
from tiny import tiny_model

from distill.training.masters import join, split

BF16 = {"weights": "bf16", "precision": "bf16"}


def test_a_master_is_split_into_bf16_and_a_rest_and_put_together_exactly():
    values = torch.cat([torch.randn(10_000) * 10.0**power for power in (-30, -3, 0, 20)])
    weight, rest = split(values)
    assert torch.equal(join(weight, rest), values)
    torch.testing.assert_close(weight.float(), values.bfloat16().float(), rtol=2**-7, atol=0)
    assert ((weight.float() - values).abs() <= (values.bfloat16().float() - values).abs()).all()  # to the nearest
    assert weight.dtype == torch.bfloat16 and rest.dtype == torch.int16


def test_bf16(corpus, tmp_path):
    model, said = run(corpus, tmp_path / "a", **BF16)
    print(said, model.dtype)
    for opt in ("adamw", "adamw_8bit"):
        run(corpus, tmp_path / opt, optimizer=opt, **BF16)
        run(corpus, tmp_path / (opt+"x"), optimizer=opt)
        for f in load_file(published(tmp_path / opt / "checkpoints")[-1] / "optimizer.safetensors").items(): print(f[0], f[1].dtype, f[1].shape)
    model, said = run(corpus, tmp_path / "l", lora={})
    print(said)
    model, said = run(corpus, tmp_path / "lb", lora={}, **BF16)
    print([n for n,_ in model.named_parameters()][:20])
    assert 0
