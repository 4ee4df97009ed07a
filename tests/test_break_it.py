"""docs/break_it.md in miniature: each experiment shows what the page says it shows."""
import json

import numpy as np
import pytest

import train
from helpers import BASE, HERE

WHOLE = [*BASE, '--widths', '16,16,16,16', '--crop', 16, '--batch', 16, '--micro-batch', 16, '--lr', '1e-2']
EXPERIMENTS = {                                                          # what is broken: flags, as the page has them
    'whole': [],
    'no variance, no covariance': ['--std-coeff', 0, '--cov-coeff', 0, '--standardize', 'false'],
    'no covariance': ['--cov-coeff', 0],
    'copying': ['--views', 'same'],
    'no predictor': ['--predictor', 'identity'],
    'pixels': ['--model', 'pixels'],
    'labels': ['--supervised']}


@pytest.fixture(scope='module')
def logs(well, tmp_path_factory):
    """{experiment: {term: its values, step by step}}."""
    found, folder = {}, tmp_path_factory.mktemp('broken')
    for name, flags in EXPERIMENTS.items():
        out = folder / name.replace(' ', '-')
        train.main([str(f) for f in (*WHOLE, *flags, '--steps', 30, '--data-dir', well, '--out', out)])
        lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
        found[name] = {term: np.array([line[term] for line in lines]) for term in lines[0]}
    return found


def test_without_variance_and_covariance_it_collapses(logs):
    """The loss becomes easy, for all windows get the same embedding. The rank, which ignores size, need not fall."""
    broken, whole = logs['no variance, no covariance'], logs['whole']
    assert broken['embedding_std'][-1] < 0.5 * broken['embedding_std'][0] and broken['loss'][-1] < 0.5 * broken['loss'][0]
    assert whole['embedding_std'][-1] > whole['embedding_std'][0]


def test_without_covariance_all_channels_say_the_same(logs):
    assert logs['no covariance']['embedding_rank'][-5:].mean() < 0.7 * logs['whole']['embedding_rank'][-5:].mean()


def test_a_target_that_is_the_context_is_copied(logs):
    assert logs['copying']['sim'][-5:].mean() < 0.3 * logs['whole']['sim'][-5:].mean()


def test_the_identity_has_nothing_to_learn(logs):
    """It loses little all the same: the encoder makes the two views alike."""
    losses = {name: logs[name]['loss'][-5:].mean() for name in ('no predictor', 'whole')}
    assert losses['no predictor'] < min(logs['no predictor']['loss'][0], 1.5 * losses['whole'])


def test_pixels_and_labels_are_targets_too(logs):
    assert logs['pixels']['loss'][-5:].mean() < logs['pixels']['loss'][0]
    assert logs['labels']['loss'][-5:].mean() < 0.9 * logs['labels']['loss'][:3].mean()


def test_the_page_has_these_commands():
    page = (HERE / 'docs/break_it.md').read_text()
    for name, flags in EXPERIMENTS.items():
        assert ' '.join(map(str, flags)) in page, name
