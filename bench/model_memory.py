"""The subcommand ``memory``: what a training step of a whole model holds, native and ours, at several batch sizes."""

from . import model, report

DEFAULTS = {
    "model": ["mobilenet_v2", "resnet50"],
    "batch": [8, 16, 32],
    "layout": ["channels_last"],
    "variant": ["native", "native-checkpoint", "normfused", "normfused-recompute"],
}
# Momentum and what is allocated once come with the first step.
WARM_UP_STEPS = 1

LEGEND = (
    "Random images, SGD with momentum. Memory is PyTorch's own, beyond parameters and momentum: what the forward pass "
    "leaves for the backward pass, and the worst moment of a step; percentages are of the first variant's. On the CPU "
    "every allocation is counted (torch.profiler), so that runs agree; a GPU's are its allocator's figures."
)


def measure(model_name, layout, batch, options):
    """Rows, one for each variant, of one model in one layout: dicts that JSON can hold."""
    made, x, y, autocast = model.prepare(model_name, layout, batch, options)
    rows = []
    for variant in options.variant:
        row = model.empty_row(model_name, layout, batch, options, variant)
        rows.append(row)
        try:
            training = model.Training(variant, made, x, y, autocast)
            for _ in range(WARM_UP_STEPS):
                training.step()
            row["kept_bytes"], row["peak_bytes"] = training.memory()
        except Exception as error:  # no memory for it, say
            row["failure"] = model.reason(error)
        training = None  # the next has all of the memory
    return rows


def table(rows):
    """Rows of ``measure`` as a Markdown table."""
    header = ["model", "batch", "layout", "dtype", "variant", "kept for backward", "peak of a step"]
    firsts = model.first_variants(rows)
    lines = []
    for row in rows:
        where = model.place(row)
        failed = row["failure"] is not None
        cells = [f"failed: {row['failure']}", ""] if failed else model.percentages(row, firsts[where])
        lines.append([*where, row["variant"], *cells])
    return report.table(header, lines)


def markdown(rows, where):
    """The result as one Markdown page."""
    return model.page("memory of a training step", LEGEND, table(rows), rows, where)


def add_command(commands, positive):
    """The subcommand's arguments; ``positive(kind)`` parses positive numbers."""
    ours = commands.add_parser(
        "memory",
        help="peak memory of a training step of whole models",
        description="Memory of a training step of MobileNetV2 and ResNet-50 at ImageNet's size: native, native with "
        "each block under torch.utils.checkpoint, converted by normfused.convert, and converted under "
        "normfused.recompute_activations. `report` draws it.",
    )
    model.add_selection(ours, positive, "memory", DEFAULTS)
    return ours


def main(options, arguments, error):
    """Run the command; returns the exit status."""
    return model.run("memory", measure, markdown, options, arguments, error)
