"""`lftpipe toy`: figure 3, paired points of the plane under every objective."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.outputs import making
from lftpipe.base.workspace import require_json_name
from lftpipe.config.settings import ToySettings
from lftpipe.flow.objective import ErrorScale, Loss, flow_matching, flow_walking, walk_times
from lftpipe.flow.path import LinearPath, States, Times
from lftpipe.flow.solver import Method, ODESolver, equal_times
from lftpipe.reporting.plots import save
from lftpipe.results.outcomes import ToyFigure
from lftpipe.results.recoupling import Panel, Toy

#: Panels: title, steps of walking (0: none), weight of standard flow matching.
PANELS = (
    ("SFM", 0, 1.0),
    ("FW, k = 1", 1, 0.0),
    ("FW, k = 2", 2, 0.0),
    ("FW, k = 3", 3, 0.0),
    ("hybrid, k = 3, alpha = 0.001", 3, 0.001),
)

#: Keys by which the toy's results are known, whole or damaged.
MARKS = (b'"pairs_kept"', b'"panels"')

#: Points whose trajectories are drawn.
DRAWN_POINTS = 80


@on_device
def toy(settings: ToySettings) -> ToyFigure:
    """Learn to carry two clusters to each other's place, crosswise, and draw the trajectories.

    Straight lines between partners all cross in the middle. There standard flow matching averages
    over them, and its points end with the wrong partners: it recouples. Walking is judged by where
    it ends, and keeps the pairs (section 3.1).

    Raises `SettingsError` if the files exist and `force` is not set.
    """
    out = settings.out or settings.workspace / "toy.json"
    require_json_name(out)
    picture = out.with_suffix(".png")
    with making(out, [picture], marks=MARKS, force=settings.force) as staging:
        panels, drawn = [], []
        with progress.task("toy", settings.steps * len(PANELS), "steps") as task:
            for title, walk_steps, alpha in PANELS:
                panel, places = _panel(settings, title, walk_steps, alpha, task)
                panels.append(panel)
                drawn.append(places)
        result = Toy(seed=settings.seed, steps=settings.steps, panels=panels)
        _draw(panels, drawn, pairs(2000, settings.seed + 1), staging.path(picture))
        result.write(staging.path(out))
    return ToyFigure(toy=result, out=str(out))


def _panel(
    settings: ToySettings, title: str, walk_steps: int, alpha: float, task: progress.Task
) -> tuple[Panel, list[Tensor]]:
    """Train one panel's velocity: what it keeps, and some points' trajectories."""
    torch.manual_seed(settings.seed)
    velocity = PlaneVelocity()
    _learn(velocity, settings, walk_steps, alpha, task)
    x_0, x_1 = pairs(2000, settings.seed + 1)
    k = walk_steps or settings.steps_at_inference
    with torch.no_grad():
        end = ODESolver(velocity).sample(x_0, 1 / k, settings.solver)
    panel = Panel(
        panel=title,
        k=k,
        solver=settings.solver,
        pairs_kept=keeps_pair(end, x_1).float().mean().item(),
        nmse=((end - x_1).square().sum() / x_1.square().sum()).item(),
    )
    return panel, _trajectories(velocity, x_0[:DRAWN_POINTS], settings.solver, k)


class PlaneVelocity(nn.Module):
    """A small velocity field of the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )

    def forward(self, x: States, t: Times, step_size: Times) -> States:
        """The velocity at places and times."""
        del step_size  # one velocity for steps of every size
        return self.layers(torch.cat([x, t[:, None, None].expand(-1, x.shape[1], 1)], -1))


def pairs(count: int, seed: int) -> tuple[States, States]:
    """`x_0` in two clusters on the left and `x_1` in two on the right, each at the other one's height."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
    x_0 = torch.cat([-torch.ones_like(side), side], -1) + 0.15 * torch.randn(count, 2, generator=generator)
    x_1 = torch.stack([x_0[:, 0] + 2, x_0[:, 1] - 2 * side[:, 0]], -1)
    return x_0[:, None], x_1[:, None]


def keeps_pair(end: States, x_1: States) -> Bool[Tensor, "point"]:
    """Whether a point ended on its partner's side of the middle."""
    return (end[:, 0, 1] * x_1[:, 0, 1]) > 0


def _learn(
    velocity: nn.Module, settings: ToySettings, walk_steps: int, alpha: float, task: progress.Task
) -> None:
    optimizer = torch.optim.AdamW(velocity.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        x_0, x_1 = pairs(settings.batch, settings.seed + 1000 + step)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        draws = torch.rand(max(walk_steps, 1), settings.batch, generator=generator)
        loss = _loss(velocity, x_0, x_1, draws, walk_steps, alpha, settings.solver)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        task.advance(1, loss=f"{loss.item():.4f}")


def _loss(
    velocity: nn.Module,
    x_0: States,
    x_1: States,
    draws: Float[Tensor, "draw sequence"],
    walk_steps: int,
    alpha: float,
    method: Method,
) -> Loss:
    scale = ErrorScale("none")
    loss = x_0.new_zeros(())
    if walk_steps:
        end = ODESolver(velocity).sample(x_0, method=method, time_grid=walk_times(draws[1:]))
        loss = loss + flow_walking(end, x_1, scale)
    if alpha:
        loss = loss + alpha * flow_matching(velocity, LinearPath(x_0, x_1).sample(draws[0]), x_1, scale)
    return loss


@torch.no_grad()
def _trajectories(velocity: nn.Module, x_0: States, method: Method, k: int) -> list[Tensor]:
    """Where the points are at inference's steps; the many steps of SFM's as a curve."""
    grid = equal_times(1 / k)
    solver, places = ODESolver(velocity), [x_0]
    for start in range(k):
        places.append(solver.sample(places[-1], method=method, time_grid=grid[start : start + 2]))
    return places


def _draw(panels: list[Panel], drawn: list[list[Tensor]], cloud: tuple[Tensor, Tensor], path: Path) -> None:
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axis, panel, places in zip(axes, panels, drawn, strict=True):
        for points, colour in zip(cloud, ("#0072B2", "#D55E00"), strict=True):
            axis.scatter(points[:300, 0, 0], points[:300, 0, 1], s=4, c=colour, alpha=0.4)
        lines = torch.stack([place[:, 0] for place in places])
        axis.plot(lines[..., 0], lines[..., 1], color="0.3", linewidth=0.5, marker=".", markersize=2)
        axis.set_title(f"{panel.panel}\npairs kept: {panel.pairs_kept:.0%}")
    save(figure, path, dpi=130)


def summary(result: ToyFigure) -> str:
    """What each panel kept."""
    lines = [
        f"{panel.panel}: {panel.pairs_kept:.1%} of the pairs kept, NMSE {panel.nmse:.4f} "
        f"({panel.k} {panel.solver} steps)"
        for panel in result.toy.panels
    ]
    return "\n".join([*lines, f"{result.out} and {Path(result.out).with_suffix('.png')}"])
