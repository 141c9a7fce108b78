"The conformance checks can fail: each finds its fault."

import pytest
import torch

import dmr
from dmr.routing.conformance import require

torch.set_num_threads(1)


class Shrink(dmr.Modification):
    """A proper little method: takes away a tenth of the gradient once a domain
    is over.
    """

    def __init__(self):
        self.domains = self.steps = 0

    def __repr__(self):
        return "Shrink()"

    def edited(self):
        return None if self.domains else ()

    def learn(self, grads):
        self.steps += 1

    def begin(self, vectors, overlap):
        return torch.tensor(0.5) if overlap else None

    def edit(self, name, x):
        return dmr.Dense(0.1 * self.domains * x)

    def consolidate(self):
        if not self.steps:
            raise ValueError("no step yet")
        self.domains, self.steps = self.domains + 1, 0
        return {"domains": self.domains}

    def state_dict(self):
        return {"domains": self.domains, "steps": self.steps}

    def load_state_dict(self, state):
        self.domains, self.steps = state["domains"], state["steps"]


def fault(**methods):
    return type("Faulty", (Shrink,), methods)


FAULTS = {
    "identity": fault(
        edited=lambda self: None, edit=lambda self, name, x: dmr.Dense(0.1 * x)
    ),
    "routings": fault(edit=lambda self, name, x: None),
    "gradients": fault(
        begin=lambda self, vectors, overlap: (
            [vectors[n].mul_(2) for n in vectors] and None
        )
    ),
    "resumption": fault(load_state_dict=lambda self, state: None),
    "types_and_devices": fault(edit=lambda self, name, x: dmr.Dense(x / 0)),
    "missing_gradients": fault(
        edited=lambda self: None,
        end=lambda self, grads=None: self.model[0].bias.data.add_(1),
    ),
    "reports": fault(memory=lambda self: 0.5),
    "overlap": fault(
        begin=lambda self, vectors, overlap: (
            torch.tensor(1.5) if overlap else None
        )
    ),
    "errors": fault(consolidate=lambda self: {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault(name):
    import dmr.routing.conformance

    one = getattr(dmr.routing.conformance, name)
    one(lambda problem: Shrink())
    with pytest.raises((AssertionError, ValueError)) as found:
        one(lambda problem: FAULTS[name]())
    require(str(found.value) != "", "the check says what went wrong")
