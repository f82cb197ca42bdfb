"""Which questions of a set are loaded: its splits, and a limit."""

import pytest

from benchmark_folders import figstep_clone, figstep_rows, mme_folder, safety_folder
from davsp.benchmarks import figstep, llava_bench, mm_safetybench, mm_vet, mme
from davsp.errors import DavspError

pytestmark = pytest.mark.filterwarnings("ignore::davsp.benchmarks.source.ShortWarning")  # all fixtures are short


@pytest.mark.parametrize("benchmark", [mm_vet, mme, llava_bench])
def test_a_set_that_is_a_test_as_a_whole_has_no_other_split(benchmark, tmp_path):
    with pytest.raises(DavspError, match=f"{benchmark.NAME} has only the split test, not 'train'"):
        benchmark.load(tmp_path, "train")


def test_limit_is_a_seeded_draw_in_order(tmp_path):
    figstep_clone(tmp_path, figstep_rows(20))
    every = [q.id for q in figstep.load(tmp_path)]
    ids = [q.id for q in figstep.load(tmp_path, limit=7, seed=3)]
    assert ids == [q.id for q in figstep.load(tmp_path, limit=7, seed=3)] == [i for i in every if i in ids]
    assert len(ids) == 7 and ids != [q.id for q in figstep.load(tmp_path, limit=7, seed=4)]
    assert len(figstep.load(tmp_path, limit=99)) == 40
    with pytest.raises(DavspError, match="limit=0"):
        figstep.load(tmp_path, limit=0)


def test_limit_draws_whole_groups(tmp_path):
    """Half a picture of MME would make acc+ a mere acc; an intent of MM-SafetyBench has all its pictures or none."""
    mme_folder(tmp_path)
    for limit, count in ((2, 2), (3, 2), (5, 4), (1, 1)):
        queries = mme.load(tmp_path, limit=limit)
        assert len(queries) == count and len({q.group for q in queries}) == max(1, count // 2)
    safety_folder(tmp_path / "mm")
    assert {q.benchmark for q in mm_safetybench.load(tmp_path / "mm", limit=5)} == set(mm_safetybench.TYPES)
