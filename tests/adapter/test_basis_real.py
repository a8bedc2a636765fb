"""The real embedded model against NumPy's LAPACK in float64. Every module of a larger one: bench/speed/basis.py."""

import time
from pathlib import Path

import numpy as np
import pytest

from tinylora.adapter.attach import linear_maps
from tinylora.adapter.basis import model_basis
from tinylora.adapter.canonical import canonical_weight
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.projection import projection
from tinylora.models.base import BaseModel

COMPARED_BLOCKS = (0, 1, 7, 15, 22, 29)
"""A full SVD takes half a second of an old core, and there are 210 modules in 30 blocks."""


@pytest.mark.model
def test_update_equals_lapack_on_every_kind_of_module(smollm2: BaseModel, tmp_path: Path) -> None:
    modules = {path: module for path, module in linear_maps(smollm2.model).items() if path != "lm_head"}
    assert len(modules) == 210
    factors, excluded = model_basis(modules, AdapterConfig(), tmp_path, smollm2.files)
    assert not excluded
    errors, turned = {}, 0
    for path, module in modules.items():
        f, P = factors[path], projection(0, path, 1, 2)[0]
        assert f.residual <= 1e-9 and f.gap >= 1e-6 and f.sign_margin >= 1e-4, path
        if not any(f".{block}." in path for block in COMPARED_BLOCKS):
            continue
        U, S, Vh = np.linalg.svd(canonical_weight(module).double().numpy(), full_matrices=False)
        signs = np.sign((Vh[:2].T * f.V.numpy()).sum(axis=0))
        expected = (U[:, :2] * signs * S[:2]) @ P @ (Vh[:2] * signs[:, None])
        errors[path] = np.linalg.norm((f.U * f.S).numpy() @ P @ f.V.numpy().T - expected) / np.linalg.norm(expected)
        turned += int((signs < 0).sum())
    assert len(errors) == 42
    assert max(errors.values()) < 1e-6, max(errors, key=lambda path: errors[path])
    assert turned > 10  # LAPACK's signs are arbitrary, so the rule must have had something to do

    started = time.perf_counter()
    again, _ = model_basis(modules, AdapterConfig(), tmp_path, smollm2.files)
    assert time.perf_counter() - started < 1.0
    assert list(again) == list(factors)
