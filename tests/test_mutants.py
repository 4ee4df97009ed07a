"""mutants.py's list goes stale whenever a line or a test is renamed."""
from mutants import mistakes


def test_each_mutant_has_its_line_and_its_tests():
    assert not mistakes()
