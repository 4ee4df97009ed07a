"""The fixtures are in shared_fixtures.py, which test_all.py asks for by itself."""


def pytest_configure(config):
    config.pluginmanager.import_plugin('shared_fixtures')
