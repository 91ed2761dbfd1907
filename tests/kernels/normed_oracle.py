"""What normed_linear and normed_conv are held to: float64, and what torch's own arithmetic makes of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fer_kernels import RowNorm
from fer_kernels.checks import accumulation_dtype

ACTS = [None, "relu", "gelu"]
EPS = 1e-3
GELU_OFF = {torch.float32: 2.4e-7, torch.bfloat16: 1.1e-5}  # the kernel's Φ, as csrc/cpu/channels.h says


class Problem:
    """x, m, weight, x's norm, and the gradients of y and its statistics, in float64: x, m and y's gradient as
    `dtype` holds them, in which they go in."""

    def __init__(
        self,
        rows,
        width,
        out,
        groups=1,
        norm=True,
        m=False,
        affine=True,
        act=None,
        seed=0,
        mean=0.0,
        dtype=torch.float32,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).double()

        columns = groups * width
        self.groups, self.act, self.dtype = groups, act, dtype
        self.leaves = {"x": draw(rows, columns) + mean, "weight": draw(groups * out, width * (2 if m else 1))}
        if m:
            self.leaves["m"] = draw(rows, columns)
        if norm:
            self.leaves |= {"mean": draw(columns) + mean, "var": draw(columns).square() + 0.1}
            if affine:
                self.leaves |= {"scale": draw(columns), "shift": draw(columns)}
        self.grads = draw(rows, groups * out).to(dtype).double(), draw(groups * out), draw(groups * out)
        self.leaves |= {
            name: self.leaves[name].to(dtype).double() for name in self.leaves.keys() & {"x", "m"}
        }

    def shaken(self, t: Tensor, noise: torch.Generator | None) -> Tensor:
        """Every number by its own rounding, and the columns of rows as wholes by that of a usual number: sums
        over rows may cancel, but their roundings do not."""
        if noise is None:
            return t
        rounding = torch.finfo(self.dtype).eps / 2
        moved = t * (1 + rounding * torch.randn(t.shape, generator=noise))
        if t.dim() > 1:
            moved += rounding * t.square().mean().sqrt() * torch.randn(self.columns_of(t), generator=noise)
        return moved

    def columns_of(self, t: Tensor) -> torch.Size:
        return t.shape[1:]

    def activated(self, z: Tensor, noise: torch.Generator | None) -> Tensor:
        exact = {None: z, "relu": F.relu(z), "gelu": F.gelu(z)}[self.act]
        if noise is None or self.act != "gelu":
            return exact
        off = torch.randn(z.shape, generator=noise) + torch.randn(z.shape[1:], generator=noise)
        return exact + z * (GELU_OFF[self.dtype] * off)

    def run(self, function, exact: bool = False, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """`exact`: in float64. Else nodes are of `dtype`, and all other tensors of what accumulates that."""
        nodes = torch.float64 if exact else self.dtype
        wide = accumulation_dtype(nodes)
        dtypes = {"x": nodes, "m": nodes, "y": nodes}
        given = {
            name: self.shaken(t, noise).to(dtypes.get(name, wide), copy=True)
            for name, t in self.leaves.items()
        }
        leaves = {name: t.requires_grad_() for name, t in given.items()}
        outputs = function(leaves, self) if noise is None else function(leaves, self, noise)
        found = dict(zip(("y", "y_mean", "y_var"), outputs, strict=True))
        assert all(t.dtype == dtypes.get(name, wide) for name, t in found.items())
        grads = [self.shaken(g, noise).to(t.dtype) for g, t in zip(self.grads, outputs, strict=True)]
        torch.autograd.backward(outputs, grads)
        found |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        return {name: t.detach().double() for name, t in found.items()}


def normed(problem: Problem, leaves: dict[str, Tensor], noise: torch.Generator | None) -> Tensor:
    """What is multiplied, of x's dtype; computed in what accumulates that."""
    x = leaves["x"]
    if "mean" not in leaves:
        return x
    x = (x - leaves["mean"]) * torch.rsqrt(leaves["var"] + EPS)
    if "scale" in leaves:
        x = x * leaves["scale"] + leaves["shift"]
    return problem.activated(x, noise).to(leaves["x"].dtype)


def row_norm(problem: Problem, leaves: dict[str, Tensor]) -> RowNorm | None:
    if "mean" not in leaves:
        return None
    return RowNorm(
        *(leaves.get(name) for name in ("mean", "var", "scale", "shift")), eps=EPS, act=problem.act
    )


def check(problem: Problem, eager, ours) -> None:
    """Off by no more than twice what torch's own arithmetic is, and four times what rounding of what goes in
    does, as a norm; more where it is of few numbers, whose luck differs."""
    truth = problem.run(eager, exact=True)
    theirs, found = problem.run(eager), problem.run(ours)
    shaken = [problem.run(eager, True, torch.Generator().manual_seed(s)) for s in range(6)]
    rounding = torch.finfo(problem.dtype).eps / 2
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        usual = torch.stack([(other[name] - expected).norm() for other in shaken]).square().mean().sqrt()
        few = 1 + 2 / max(1, expected.numel()) ** 0.5
        bound = 2 * (theirs[name] - expected).norm() + 4 * few * usual + 2 * rounding * expected.norm()
        assert (found[name] - expected).norm() <= bound, name


def as_near(run, chained, zero: str | None = None) -> None:
    """run(seed, dtype) of modules that chain is as far from float32 as without a chain, or nearer, over some
    draws: of few numbers one draw says little. `zero` is nothing but rounding."""
    off: dict[str, dict[str, list[Tensor]]] = {}
    for seed in range(4):
        chained(False)
        exact = run(seed, torch.float32)
        apart = run(seed, torch.bfloat16)
        chained(True)
        for name, value in run(seed, torch.bfloat16).items():
            assert value.dtype == apart[name].dtype, name
            truth = exact[name].double()
            here = off.setdefault(name, {"ours": [], "theirs": [], "size": []})
            here["ours"].append((value - truth).norm())
            here["theirs"].append((apart[name] - truth).norm())
            here["size"].append(truth.norm())
    for name, norms in off.items():
        ours, theirs, size = (torch.stack(norms[of]).norm() for of in ("ours", "theirs", "size"))
        assert name == zero or ours <= 1.5 * theirs + 2**-9 * size, (name, ours / size, theirs / size)


def check_derivatives(problem: Problem, ours, backend: str) -> None:
    """By differences; float32's differences of differences say little: they are as the reference's."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    options = {} if backend == "reference" else {"eps": 1e-2, "atol": 2e-2, "rtol": 1e-2}
    names = list(problem.leaves)
    leaves = [t.to(dtype).requires_grad_() for t in problem.leaves.values()]

    def run(*tensors):
        return ours(backend)(dict(zip(names, tensors, strict=True)), problem)

    assert torch.autograd.gradcheck(run, leaves, **options)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, leaves, **options)
        return
    found = []
    for each in ("cpu", "reference"):
        outputs = ours(each)(dict(zip(names, leaves, strict=True)), problem)
        grads = [g.to(dtype) for g in problem.grads]
        first = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for cpu, reference in zip(*found, strict=True):
        torch.testing.assert_close(cpu, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


def check_same_bits(problem: Problem, ours) -> None:
    """Every time, for any number of threads."""
    expected = problem.run(ours)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(5):
            for name, found in problem.run(ours).items():
                assert torch.equal(found, expected[name]), (threads, name)
