import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from data_samples import encode_source

from jaxtrain.config.train_config import DataConfig, MeshConfig
from jaxtrain.data.loader import build_batches
from jaxtrain.data.mixture import MixedOrder, Mixture, StagePlan, build_pattern
from jaxtrain.data.shard_writer import ShardWriter
from jaxtrain.data.sources import open_split, open_splits
from jaxtrain.distributed.mesh import build_mesh

T, B, EOT, STEPS = 16, 8, 1_000, 40
SIZES = 100_000, 7_919, 1_009
STAGES = [StagePlan(0, (9, 1, 0)), StagePlan(400_000, (5, 2, 3)), StagePlan(700_003, (0, 83, 17))]
DRAWS = 1_000_000


def test_a_million_draws_have_exact_proportions_in_every_window_of_a_period():
    source, before = Mixture(STAGES).sources(np.arange(DRAWS))
    ends = [*(stage.start for stage in STAGES[1:]), DRAWS]
    for stage, end in zip(STAGES, ends, strict=True):
        is_source = source[stage.start : end, None] == np.arange(3)
        counts = np.concatenate([np.zeros((1, 3), int), np.cumsum(is_source, axis=0)])
        period = sum(stage.quotas)
        assert (counts[period:] - counts[:-period] == stage.quotas).all()
        expected = np.arange(len(counts))[:, None] * stage.quotas / period
        assert abs(counts - expected).max() < 1  # from the start of the stage to any place
    for i in range(3):
        drawn = before[source == i]
        assert (drawn == np.arange(len(drawn))).all()  # no sequence is skipped or repeated


def test_a_million_draws_cover_each_source_once_per_epoch():
    numbers = MixedOrder(Mixture(STAGES), SIZES, seed=3)(np.arange(DRAWS))
    first = 0
    for size in SIZES:
        own = numbers[(numbers >= first) & (numbers < first + size)] - first
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert len(whole) > 2 and (np.sort(whole) == np.arange(size)).all()
        assert len(np.unique(own[whole.size :])) == len(own) % size
        assert (whole[0] != whole[1]).any()  # another order in each epoch
        first += size


def test_sites_read_every_sequence_of_a_source_once_before_any_is_read_again():
    order = [MixedOrder(Mixture(STAGES), SIZES, 3, (site, 3)) for site in range(3)]
    places = np.arange(390_000)
    together = np.stack([own(places) for own in order])  # all sites read the same source at a place
    for first, size in ((0, SIZES[0]), (SIZES[0], SIZES[1])):
        own = together.T[(together[0] >= first) & (together[0] < first + size)].ravel() - first
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert len(epochs) > 5 and (np.sort(epochs) == np.arange(size)).all()


def test_counts_of_any_place_need_no_replay():
    mixture = Mixture(STAGES)
    source, before = mixture.sources(np.arange(DRAWS))
    for place in (0, 1, 399_999, 400_000, 700_002, 700_003, 999_999):
        counts = mixture.counts(place)
        assert (counts == np.bincount(source[:place], minlength=3)).all()
        assert before[place] == counts[source[place]]
    far = 10**15
    assert mixture.counts(far).sum() == far
    assert abs(mixture.counts(far) - mixture.counts(700_003) - (far - 700_003) * 0.17)[2] < 1


@pytest.mark.parametrize("quotas", [(1,), (1, 1, 1), (3, 1), (89, 5, 3, 2, 1), (7, 7, 7, 50, 2, 1)])
def test_no_prefix_of_a_pattern_deviates_more_than_tijdemans_bound(quotas):
    pattern = build_pattern(quotas)
    counts = np.cumsum(pattern[:, None] == np.arange(len(quotas)), axis=0)
    assert (counts[-1] == quotas).all()
    expected = np.arange(1, len(pattern) + 1)[:, None] * quotas / sum(quotas)
    assert abs(counts - expected).max() <= 1 - 1 / max(2 * len(quotas) - 2, 1) + 1e-9


def write_source(folder, first, documents):
    """Writes shards of documents in which every token is unique; returns the tokens."""
    for split, n in (("train", documents), ("val", 4)):
        lengths = np.random.default_rng(first).integers(2, 60, n)
        tokens = first + np.arange(lengths.sum())
        tokens[np.cumsum(lengths) - lengths] = EOT
        writer = ShardWriter(folder, "x", split, "<u2", 1_500)
        writer.append(tokens, [(len(tokens), 0)])
        writer.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, first, documents in (("web", 2_000, 120), ("code", 20_000, 30), ("math", 40_000, 60)):
        (folder / name).mkdir()
        write_source(folder / name, first, documents)
    return folder


def mixed(folder, names="web code math", **options):
    mixture = " ".join(f"{name}={folder}/{name.split('_')[0]}" for name in names.split())
    stages = "web 0.75, code 0.25 until 40%; web 0.5, code 0.2, math 0.3"
    options = {"mixture": mixture, "stages": stages} | options
    return DataConfig(batch=B, seq_len=T, eot=EOT, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def build(cfg, folder, mesh=(1, 1, 1), steps=STEPS, site=(0, 1)):
    corpus = open_split(cfg, "train", 65_536, folder, steps)
    mesh = build_mesh(MeshConfig(*mesh), devices=jax.devices()[: int(np.prod(mesh))])
    return build_batches(cfg, corpus, mesh, 3, site)


def read(batches, steps):
    return [jax.tree.map(np.asarray, next(batches)) for _ in range(steps)]


def equal(a, b):
    # A source's number is its place among the names, so another list of names gives another one.
    keys = lambda x, y: (x.keys() | y.keys()) - {"source"}
    return all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in keys(x, y))


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"document_mask": True}])
def test_batch_n_is_the_same_on_any_mesh_and_after_any_restart(options, folder):
    cfg = mixed(folder, **options)
    with build(cfg, folder) as batches:
        whole = read(batches, STEPS)
        state = json.loads(json.dumps(batches.state()))
    source = np.concatenate([batch["tokens"].max(axis=1) for batch in whole]) // 20_000
    assert (np.bincount(source[: 16 * B]) == [96, 32]).all()  # of web and code
    with build(cfg, folder, (2, 2, 2)) as batches:
        batches.restore(state | {"step": 15})
        assert equal(read(batches, 3), whole[15:18])


def test_a_mixture_of_one_source_reads_the_batches_of_a_run_on_that_source(folder):
    plain = DataConfig(batch=B, seq_len=T, eot=EOT, shards=f"{folder}/web")
    one = mixed(folder, "web", stages="web 1")
    for site in ((0, 1), (1, 2)):
        with build(plain, folder, site=site) as a, build(one, folder, site=site) as b:
            assert equal(read(a, 60), read(b, 60))


@pytest.mark.parametrize(
    ("names", "stages", "message"),
    [
        ("web code_math math", None, r"source code_math .*|source code is gone"),
        ("web code math", "web 0.5, code 0.5 until 40%; math 1", "stage 1 was code 1/4, web 3/4"),
        ("web code math", "web 0.75, code 0.25 until 20%; math 1", "stage 2 was not reached, now"),
    ],
)
def test_a_run_does_not_resume_with_another_past(names, stages, message, folder):
    with build(mixed(folder), folder) as batches:
        state = batches.state() | {"step": 12}
    stages = stages or mixed(folder).stages.replace("code", "code_math")
    with build(mixed(folder, names, stages=stages), folder) as batches:
        with pytest.raises(ValueError, match=message):
            batches.restore(state)


def test_stages_ahead_and_unread_sources_may_change(folder):
    with build(mixed(folder), folder) as batches:
        state, whole = batches.state() | {"step": 12}, read(batches, 16)
    later = mixed(folder, "code web", stages="code 1/4, web 3/4")
    with build(later, folder, steps=100) as batches:
        batches.restore(state)
        assert equal(read(batches, 4), whole[12:])
        with pytest.raises(ValueError, match=r"stage 2 was code 1/5.* from step 16, now not reach"):
            batches.restore(state | {"step": 17})


def test_other_tokens_of_a_source_and_a_missing_mixture_are_refused(folder, tmp_path):
    with build(mixed(folder), folder) as batches:
        state = batches.state() | {"step": 1}
    write_source(tmp_path, 20_001, 30)
    other = mixed(folder).mixture.replace(f"{folder}/code", str(tmp_path))
    with build(replace(mixed(folder), mixture=other), folder) as batches:
        with pytest.raises(ValueError, match=r"source code has fingerprint .*--data\.mixture"):
            batches.restore(state)
    plain = DataConfig(batch=B, seq_len=T, eot=EOT, shards=f"{folder}/web")
    with build(plain, folder) as batches:
        plain_state = batches.state() | {"step": 1}
        with pytest.raises(ValueError, match="fingerprint=None, now"):
            batches.restore(state)
    with build(mixed(folder), folder) as batches:
        with pytest.raises(ValueError, match="sources none, now code, math, web"):
            batches.restore(plain_state)


def test_a_plan_with_more_epochs_than_allowed_is_refused_with_its_tokens(folder):
    with build(mixed(folder), folder, steps=100) as batches:
        assert batches.sources
        planned = batches.sources.read_by(100)["code"]
        halved = batches.sources.read_by(50)["code"]
    assert planned["epochs"] > 2 and planned["unread_tokens"] == 0
    assert planned["tokens"] == round(0.22 * 100 * B) * T > halved["tokens"]
    needed, stored = planned["tokens"], planned["stored_tokens"]
    message = rf"got {needed:,} tokens of code .* its {stored:,} tokens"
    with pytest.raises(ValueError, match=message):
        build(mixed(folder, max_epochs="web 9, code 2"), folder, steps=100)
    build(mixed(folder, max_epochs="9"), folder, steps=100).close()


def test_a_missing_source_a_source_without_held_out_text_and_a_short_one_are_refused(folder):
    with pytest.raises(ValueError, match=r"source law: .*law='.*law', where there is nothing"):
        build(mixed(folder, "web law", stages="web 0.5, law 0.5"), folder)
    [shard] = (folder / "web").glob("*val*")
    cfg = mixed(folder, "web", stages="web 1", mixture=f"web={folder}/web/*train*")
    with pytest.raises(ValueError, match="source web: data.shards must contain a val shard"):
        open_splits(cfg, 65_536, folder, STEPS)
    short = mixed(folder, "code", stages="code 1", mixture=f"code={shard}")
    with pytest.raises(ValueError, match=r"sequence of data.seq_len=5000 .*tokens in code"):
        build(replace(short, seq_len=5_000, mixture=f"code={folder}/code"), folder)


def test_sources_of_different_tokenizers_are_refused(folder, tmp_path):
    (tmp_path / "text.txt").write_text("bytes " * 500)
    encode_source(tmp_path / "text.txt", tmp_path / "shards")
    cfg = mixed(folder, "web", stages="web 1")
    cfg = replace(cfg, mixture=f"web={folder}/web text={tmp_path}/shards")
    with pytest.raises(ValueError, match="one tokenizer; got text: bytes, web: unknown"):
        open_split(cfg, "train", 65_536, tmp_path, STEPS)


def test_a_stage_without_a_step_is_refused(folder):
    with pytest.raises(ValueError, match="stage 1, which ends after step 0"):
        build(mixed(folder, stages="web 1 until 1%; code 1"), folder, steps=20)
