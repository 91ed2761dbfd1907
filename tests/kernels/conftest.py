import pytest
import torch


@pytest.fixture
def cpu_isas():
    """The compiled CPU module, with its instruction set put back after the test."""
    from fer_kernels import extension

    if extension.cpu.module is None:
        pytest.skip(extension.cpu.problem)
    module = extension.cpu.module
    before = module.current_isa()
    yield module
    module.set_isa(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
