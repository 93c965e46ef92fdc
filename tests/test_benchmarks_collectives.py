import functools
from pathlib import Path

import pytest

from jaxtrain.benchmarks.collectives import MESHES, TABLES, main, measure_update
from jaxtrain.optim.build import OPTIMIZERS

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
OTHER_MESHES = {
    "muon": "8x1x1, 6 layers",
    "muon_h": "8x1x1",
    "muown": "1x8x1",
    "normuon": "1x4x2",
    "adam_h": "8x1x1, 6 layers",
}
# Each optimizer on one mesh, so that each mesh has at least one, and muon on two.
SAMPLED = [("muon", "2x2x2"), *((name, OTHER_MESHES.get(name, "2x2x2")) for name in OPTIMIZERS)]


@functools.cache
def documented():
    """Returns {title: {(optimizer, mesh): cell}} of the page's two tables."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    tables, title, meshes = {}, "", []
    for first, *cells in lines:
        if cells == list(MESHES):
            title, meshes = first, cells
            tables[title] = {}
        elif len(cells) != len(meshes):
            title, meshes = "", []
        elif title and "---" not in first:
            for mesh, cell in zip(meshes, cells, strict=True):
                tables[title][first.strip("`"), mesh] = cell
    return tables


def test_the_page_has_every_optimizer_on_every_mesh():
    assert list(documented()) == list(TABLES)
    for rows in documented().values():
        assert set(rows) == {(name, mesh) for name in OPTIMIZERS for mesh in MESHES}, (
            "paste the output of python -m jaxtrain.benchmarks.collectives in docs/optimizers.md"
        )


@pytest.mark.parametrize("name, mesh", SAMPLED)
def test_an_update_sends_and_stores_what_the_page_says(name, mesh):
    row = measure_update(name, mesh)
    counts, volumes = TABLES
    assert TABLES[volumes](row) == documented()[volumes][name, mesh]
    *moves, sums = TABLES[counts](row).split(" + ")
    *documented_moves, documented_sums = documented()[counts][name, mesh].split(" + ")
    assert moves == documented_moves
    # The compiler of jax 0.11.2 merges more of the small all-reduces than that of the page.
    assert int(sums) <= int(documented_sums)


def test_an_unknown_optimizer_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="must be one of .*normuon.*got .*sgd"):
        main(["sgd"])
