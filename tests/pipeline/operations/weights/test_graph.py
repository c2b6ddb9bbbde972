"""An exported graph becomes the state dict that the official file has."""

from __future__ import annotations

import numpy as np
import pytest
import timm

from pipeline.operations.weights.graph import POSITIONS, official_state
from tests.pipeline.operations.weights.tiny_graph import BLOCKS, DIM, initializers, matrix, nodes


def test_matrices_are_turned_and_queries_keys_and_values_stacked_in_that_order() -> None:
    given = initializers()
    state = official_state(given, nodes())
    for block in range(BLOCKS):
        weight, bias = (state[f"blocks.{block}.attn.qkv.{kind}"] for kind in ("weight", "bias"))
        for i, part in enumerate(("query", "key", "value")):
            rows = slice(i * DIM, (i + 1) * DIM)
            np.testing.assert_array_equal(weight[rows], given[matrix(block, f"attention/attention/{part}")].T)
            name = f"backbone.encoder.layer.{block}.attention.attention.{part}.bias"
            np.testing.assert_array_equal(bias[rows], given[name])
        np.testing.assert_array_equal(state[f"blocks.{block}.mlp.fc1.weight"], given[matrix(block, "mlp/fc1")].T)
        proj = given[matrix(block, "attention/output/dense")].T
        np.testing.assert_array_equal(state[f"blocks.{block}.attn.proj.weight"], proj)


def test_positions_are_joined_and_the_mask_token_is_zeros() -> None:
    given = initializers()
    state = official_state(given, nodes())
    np.testing.assert_array_equal(state["pos_embed"][:, :1], given[POSITIONS[0]])
    np.testing.assert_array_equal(state["pos_embed"][:, 1:], given[POSITIONS[1]])
    np.testing.assert_array_equal(state["mask_token"], np.zeros((1, DIM), np.float32))


def test_the_names_are_those_that_timm_loads_of_the_official_file() -> None:
    model = timm.create_model(
        "vit_small_patch14_dinov2.lvd142m", pretrained=False, img_size=28, depth=BLOCKS, embed_dim=DIM, num_heads=2
    )
    state = official_state(initializers(), nodes())
    assert set(state) == {*model.state_dict(), "mask_token"}
    assert {(value.dtype.name, value.flags.c_contiguous) for value in state.values()} == {("float32", True)}


def test_a_graph_that_lacks_a_layer_is_refused() -> None:
    given = initializers()
    del given[matrix(1, "attention/attention/key")]
    with pytest.raises(KeyError, match=r"blocks\.1\.attn\.key\.weight"):
        official_state(given, nodes())
