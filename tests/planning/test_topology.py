"""Topologies: what their names mean, and what is refused."""

import pytest

from mufasa_rec.planning.topology import GIB, Topology


@pytest.mark.parametrize(
    ("text", "nodes", "ranks", "device"),
    [
        ("8xH100", 1, 8, "cuda"),
        ("4xA100", 1, 4, "cuda"),
        ("64xH200", 8, 8, "cuda"),
        ("128x8xH100", 128, 8, "cuda"),
        ("2xCPU", 1, 2, "cpu"),
        ("3x16xcpu", 3, 16, "cpu"),
    ],
)
def test_name_gives_nodes_ranks_and_device(text: str, nodes: int, ranks: int, device: str) -> None:
    made = Topology.parse(text)
    assert (made.nodes, made.ranks_per_node, made.compute_device) == (nodes, ranks, device)
    assert made.world_size == nodes * ranks


@pytest.mark.parametrize("text", ["H100", "8", "8xB900", "0xH100", "-1xCPU", "1x2x3xH100", "8xH100x", "ax8xH100", ""])
def test_other_forms_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="128x8xH100"):
        Topology.parse(text)


def test_gpus_that_fill_no_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="12x1xH100"):
        Topology.parse("12xH100")


def test_memory_and_bandwidths_can_be_overridden_and_reach_the_planner() -> None:
    made = Topology.parse("2x8xH100", hbm_bytes=40 * GIB, inter_node_gb_s=10.0)
    seen = made.planner(reserved_bytes=10 * GIB)
    assert seen.devices[0].storage.hbm == 30 * GIB
    assert seen.inter_host_bw == 10.0e6
    assert seen.hbm_mem_bw == 3350.0e6
    assert (seen.world_size, seen.local_world_size) == (16, 8)
    assert made.planner(group_size=4).world_size == 4


def test_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean hbm_bytes"):
        Topology.parse("8xH100", hbm_byte=1)
    with pytest.raises(ValueError, match="ddr_gb_s=0"):
        Topology.parse("2xCPU", ddr_gb_s=0)


@pytest.mark.parametrize(
    ("text", "factor", "grown"),
    [("2xH100", 2, "1x4xH100"), ("2xH100", 8, "2x8xH100"), ("8x8xH200", 2, "16x8xH200"), ("2xCPU", 4, "4x2xCPU")],
)
def test_grown_topology_fills_its_node_first(text: str, factor: int, grown: str) -> None:
    made = Topology.parse(text).grown(factor)
    assert made.name == grown
    assert made.world_size == Topology.parse(grown).world_size == Topology.parse(text).world_size * factor
