"""The sites file is validated, and links cover every block of every pair of sites once."""

import json

import pytest

from jaxtrain.sites.layout import Address, links, owned_blocks, read_sites_file


def _content(*counts):
    sites = [
        {
            "name": f"site{i}",
            "processes": [{"address": f"10.0.{i}.{p + 1}", "port": 7301} for p in range(count)],
        }
        for i, count in enumerate(counts or (1, 2))
    ]
    return {"version": 1, "job": "j-1", "key": "0f" * 32, "sites": sites}


def _write(path, content, mode=0o600):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def _read(tmp_path, *counts):
    return read_sites_file(_write(tmp_path / "sites.json", _content(*counts)))


def test_a_sites_file_is_read_and_its_key_is_never_printed(tmp_path):
    sites = _read(tmp_path, 1, 2)
    assert sites.key == bytes([15]) * 32 and sites.names == ["site0", "site1"]
    assert sites.sites[1].processes[1] == Address("10.0.1.2", 7301)
    assert sites.index("site1") == 1
    assert "0f0f" not in repr(sites) and "\\x0f" not in repr(sites)
    with pytest.raises(ValueError, match=r"--site must be one of \['site0', 'site1'\]; got 'x'"):
        sites.index("x")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_sites_file_that_others_can_read_or_write_is_refused(tmp_path, mode):
    with pytest.raises(ValueError, match=f"readable only by its owner .* got mode {mode:04o}"):
        read_sites_file(_write(tmp_path / "sites.json", _content(), mode))


BROKEN = {
    "not JSON": ("{", "must be JSON"),
    "not an object": ("[]", "the file must be an object"),
    "another version": ({"version": 2}, "version must be 1; got 2"),
    "no job": ({"job": ""}, "job must be the name"),
    "a short key": ({"key": "ab12"}, "key must be 64 hexadecimal digits; got 4 characters"),
    "a number as key": ({"key": 12345}, "key must be of type str; got another type"),
    "an unknown field": ({"colour": 1}, r"must have the fields .* got .*'colour'"),
    "one site": ({"sites": _content(1)["sites"]}, "at least two sites; got 1"),
    "two equal names": ({"sites": _content(1)["sites"] * 2}, "names of sites must be unique"),
}
PROCESS = {
    "port zero": ({"port": 0}, r"processes\[0\] of site site0: port must be in .* got 0"),
    "a text as port": ({"port": "7301"}, "port must be of type int; got '7301'"),
    "true as port": ({"port": True}, "port must be of type int; got True"),
    "no address": ({"address": ""}, "address must be a host name"),
    "an address twice": ({"address": "10.0.1.1"}, "must be unique; got 10.0.1.1:7301"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_an_invalid_sites_file_is_refused_by_field(tmp_path, change, message):
    content = change if isinstance(change, str) else _content() | change
    with pytest.raises(ValueError, match=message) as caught:
        read_sites_file(_write(tmp_path / "sites.json", content))
    assert "sites_file" in str(caught.value) and "12345" not in str(caught.value)


@pytest.mark.parametrize("change, message", PROCESS.values(), ids=PROCESS)
def test_an_invalid_process_is_refused_by_field(tmp_path, change, message):
    content = _content()
    content["sites"][0]["processes"][0] |= change
    with pytest.raises(ValueError, match=message):
        read_sites_file(_write(tmp_path / "sites.json", content))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", "a" * 65])
def test_a_site_name_that_cannot_be_part_of_a_file_name_is_refused(tmp_path, name):
    content = _content()
    content["sites"][0]["name"] = name
    with pytest.raises(ValueError, match="name must be at most 64 letters"):
        read_sites_file(_write(tmp_path / "sites.json", content))


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("blocks", [0, 1, 5, 64])
def test_the_processes_of_a_site_own_all_blocks_in_order(blocks, processes):
    owned = [owned_blocks(blocks, processes, p) for p in range(processes)]
    assert [block for part in owned for block in part] == list(range(blocks))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (3, 2), (1, 4, 3)])
def test_links_are_symmetric_and_cover_every_block_once_for_each_pair_of_sites(tmp_path, counts):
    fragments = (17, 2, 1, 24)  # also fewer blocks than processes
    sites = _read(tmp_path, *counts)
    found = {
        (site, process): links(fragments, sites, site, process)
        for site, count in enumerate(counts)
        for process in range(count)
    }
    for (site, process), own in found.items():
        assert [(link.site, link.process) for link in own] == sorted(
            (link.site, link.process) for link in own
        )
        assert {link.site for link in own} == set(range(len(counts))) - {site}
        for link in own:
            (back,) = [
                b for b in found[link.site, link.process] if (b.site, b.process) == (site, process)
            ]
            assert back.ranges == link.ranges
    for site in range(len(counts)):
        for other in set(range(len(counts))) - {site}:
            for fragment, blocks in enumerate(fragments):
                carried = [
                    block
                    for process in range(counts[site])
                    for link in found[site, process]
                    if link.site == other
                    for block in link.ranges[fragment]
                ]
                assert sorted(carried) == list(range(blocks))


def test_sites_with_equal_numbers_of_processes_link_each_process_to_its_counterpart(tmp_path):
    sites = _read(tmp_path, 3, 3)
    for process in range(3):
        (link,) = links([10], sites, 0, process)
        assert (link.site, link.process, link.ranges[0]) == (
            1,
            process,
            owned_blocks(10, 3, process),
        )
