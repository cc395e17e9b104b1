"""The six layouts: permutations, properties and the names that users give."""

import itertools
import subprocess
import sys

import pytest

from vllm.errors import ConfigError
from vllm.v1.kv_cache_layout import KVCacheLayout

L = KVCacheLayout


def test_permutations_are_those_of_the_names():
    assert {str(layout): layout.stride_order for layout in L} == {
        "LBHNC": (0, 1, 2, 3, 4),
        "LBNHC": (0, 1, 3, 2, 4),
        "LHBNC": (0, 2, 1, 3, 4),
        "BLHNC": (1, 0, 2, 3, 4),
        "BLNHC": (1, 0, 3, 2, 4),
        "BHLNC": (1, 2, 0, 3, 4),
    }


def test_a_layer_sees_the_order_without_layers():
    assert {str(layout): layout.layer_view_order for layout in L} == {
        "LBHNC": (0, 1, 2, 3),
        "LBNHC": (0, 2, 1, 3),
        "LHBNC": (1, 0, 2, 3),
        "BLHNC": (0, 1, 2, 3),
        "BLNHC": (0, 2, 1, 3),
        "BHLNC": (0, 1, 2, 3),
    }


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("is_layer_compact", {L.LBHNC, L.LBNHC, L.LHBNC}),
        ("is_block_outermost", {L.BLHNC, L.BLNHC, L.BHLNC}),
        ("is_block_compact", {L.LBHNC, L.LBNHC, L.BLHNC, L.BLNHC}),
    ],
)
def test_properties(name, members):
    assert {layout for layout in L if getattr(layout, name)} == members


def test_head_slices_are_one_run_inside_a_page_only_where_the_page_is_h_n_c():
    contiguous = {layout for layout in L if layout.is_block_contiguous and layout.is_block_compact}
    assert contiguous == {L.LBHNC, L.BLHNC}


def test_users_names():
    assert L.from_str("HND") is L.LBHNC
    assert L.from_str("nhd") is L.LBNHC
    assert L.from_str("bhlnc") is L.BHLNC
    assert L.from_str(L.BLNHC) is L.BLNHC


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"NHCW.*LBHNC.*NHD"):
        L.from_str("NHCW")


def test_every_order_of_five_axes_that_is_missing_is_refused():
    names = {"".join(p) for p in itertools.permutations("LBHNC")} - {str(layout) for layout in L}
    for name in names:
        with pytest.raises(ConfigError):
            L.from_str(name)


def test_the_host_half_imports_no_torch():
    modules = (
        "vllm.v1.kv_cache_layout, vllm.v1.kv_cache_interface, vllm.v1.kv_cache.planner, "
        "vllm.v1.kv_cache.descriptors"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
