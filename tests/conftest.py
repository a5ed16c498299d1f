"""What the tests share: the markers of tests that not every machine runs."""


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; skip with -m "not slow"')
    config.addinivalue_line('markers', 'cuda: needs a CUDA device')
