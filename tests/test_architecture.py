"""The file list is the architecture: every module has a layer, and imports point downwards."""

import ast
import builtins
import dis
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ntkdp"

KERNELS = {
    "ntk",
    "_infinite_ntk",
    "_layerwise_kernel",
    "_two_time_kernel",
    "_kernel_blocks",
    "_per_sample_gradients",
    "_gradient_sites",
    "_gradient_factors",
    "_gradient_norms",
    "_clipped_sum",
    "_meetings",
    "_layout",
    "_groups",
    "_check_model",
    "_batch_axis",
    "_batch_axis_rules",
    "_batch_probes",
    "_same_program",
}

EXAMPLES = {
    "counterexamples",
    "table_one",
    "_table_one_evidence",
}

COMPARISON = {
    "_agreement",
    "_cell_metrics",
    "_grid",
    "_heat_maps",
    "advisor",
    "comparison",
    "_comparison",
    "_comparison_table",
    "_scores",
    "plotting",
    "_certificate_plot",
    "_clip_norm_plot",
    "_curves",
}

CALIBRATION = {"calibration", "_probabilities", "_recalibration", "_reliability_plot"}

LAYERS: dict[int, set[str]] = {
    0: {
        "_types",
        "_validate",
        "_files",
        "_folder_lock",
        "_memory",
        "_memory_limits",
        "_program_memory",
        "_mesh",
        "_mesh_eigh",
        "_missing",
        "_norms",
        "_progress",
        "_look",
        "_standard_streams",
        "_stopping",
        "_stored_elsewhere",
        "_json",
        "_precision",
    },
    1: {
        "losses",
        "clipping",
        "trajectory",
        "_setup",
        "_stepping",
        "_neural_tangents",
        "privacy",
        "_accounting",
        "_loss_sums",
        "_sampled_gaussian",
        "_composition",
        "_mechanism",
    },
    2: {
        "models",
        "_model",
        "_adapters",
        "_stax_kernels",
        "datasets",
        "_dataset",
        "_data_files",
        "_file_content",
        "_number_notation",
        "_tables",
        "spectrum",
        "_matrix_free_spectrum",
        *CALIBRATION,
        *KERNELS,
        "_phase",
    },
    3: {
        "gradient_flow",
        "_flow",
        "_kernel_flow",
        "_linearised_flow",
        "_weight_flow",
        "_heavy_ball_flow",
        "_modified_flow",
        "_solve",
        "stochastic_flow",
        "_covariance_form",
        "_followed_points",
        "_full_covariance",
        "_low_rank_covariance",
        "_ensemble",
        "_excess_variance",
        "_final_outputs",
        "_gaussian_closure",
        "_moments",
        "_output_noise",
        "_output_process",
        "_phased_flow",
        "_two_time_ensemble",
        "_two_time_flow",
        "_volterra",
        "_weight_noise",
        "certificates",
        "high_dimensional_sgd",
        "dp_sgd",
        "_dp_run",
        "_dp_step",
        "_plain_gradients",
        "_plan",
    },
    4: {*COMPARISON, *EXAMPLES, "claims"},
    5: {
        "_config",
        "_problem",
        "_prediction",
        "_whole_memory",
        "experiment",
        "_report",
        "_page",
        "_provenance",
        "_run_folder",
        "_out_path",
        "_own_files",
        "_cell_folder",
        "_cluster",
        "_compare_command",
        "_terminal",
        "_console",
        "_progress_bar",
        "_app",
        "sweep",
        "_sweep_config",
        "_sweep_report",
        "_sweep_command",
        "_verification",
        "_verification_page",
        "_privacy_command",
        "cli",
    },
}
#: Modules that may import others of their own layer, as parts of one family.
FAMILIES = (
    {
        "_types",
        "_validate",
        "_files",
        "_memory",
        "_memory_limits",
        "_program_memory",
        "_mesh",
        "_mesh_eigh",
        "_missing",
        "_norms",
        "_progress",
        "_stopping",
        "_precision",
    },
    {"models", "_model", "_adapters", "_stax_kernels"},
    {"datasets", "_dataset", "_data_files", "_file_content", "_tables", "_number_notation"},
    KERNELS,
    {
        "gradient_flow",
        "stochastic_flow",
        "_covariance_form",
        "_followed_points",
        "_full_covariance",
        "_low_rank_covariance",
        "_ensemble",
        "_excess_variance",
        "_final_outputs",
        "_gaussian_closure",
        "_moments",
        "_output_noise",
        "_output_process",
        "_phased_flow",
        "_two_time_ensemble",
        "_two_time_flow",
        "_volterra",
        "_weight_noise",
        "_flow",
        "_kernel_flow",
        "_linearised_flow",
        "_weight_flow",
        "_heavy_ball_flow",
        "_modified_flow",
        "_solve",
    },
    {"dp_sgd", "_dp_run", "_dp_step", "_plain_gradients"},
    COMPARISON,
    EXAMPLES,
    LAYERS[5],
    {"spectrum", "_matrix_free_spectrum", *KERNELS},
    CALIBRATION,
    {"privacy", "_accounting", "_composition", "_loss_sums", "_mechanism", "_sampled_gaussian"},
    {"trajectory", "_setup", "_stepping"},
)
PREDICTION = FAMILIES[4]
OBSERVATION = FAMILIES[5]
#: What the two sides may share, besides layer 0.
SHARED = {
    "losses",
    "clipping",
    "trajectory",
    "_setup",
    "_stepping",
    "_phase",
    "privacy",
    *FAMILIES[3],
}

LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
#: A folder is one module: its files are one family.
FILES = {
    path.stem: [path] if path.is_file() else sorted(path.glob("*.py"))
    for path in PACKAGE.iterdir()
    if path.suffix == ".py" or (path / "__init__.py").is_file()
}
MODULES = sorted(set(FILES) - {"__init__"})


def _nodes(module: str) -> list[ast.AST]:
    return [node for path in FILES[module] for node in ast.walk(ast.parse(path.read_text()))]


def _imports(module: str) -> set[str]:
    """Modules of ntkdp that a module imports, anywhere in it."""
    found = set()
    for node in _nodes(module):
        if isinstance(node, ast.ImportFrom) and node.module == "ntkdp":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ntkdp."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ntkdp.")
            }
    return (found & set(MODULES)) - {module}


def test_every_module_has_a_layer() -> None:
    assert set(MODULES) == set(LAYER_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    family = next((members for members in FAMILIES if module in members), {module})
    for imported in _imports(module):
        assert LAYER_OF[imported] < LAYER_OF[module] or imported in family, (
            f"{module} (layer {LAYER_OF[module]}) imports {imported} (layer {LAYER_OF[imported]})"
        )


def test_prediction_and_observation_are_strangers() -> None:
    for side in (PREDICTION, OBSERVATION):
        for module in side:
            allowed = side | SHARED | LAYERS[0]
            assert _imports(module) <= allowed, f"{module} imports {_imports(module) - allowed}"


def test_plain_gradients_share_nothing_with_the_engine() -> None:
    """Else the agreement of such a run with a prediction would prove nothing."""
    reached: set[str] = set()
    frontier = {"_plain_gradients"}
    while frontier:
        reached |= frontier
        frontier = set().union(*map(_imports, frontier)) - reached
    assert reached - {"_plain_gradients"} <= {"clipping", "losses"} | LAYERS[0]
    assert "_norms" not in _imports("_plain_gradients")


def test_only_one_module_imports_neural_tangents() -> None:
    for module in MODULES:
        names = {
            name
            for node in _nodes(module)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not any(name.split(".")[0] == "neural_tangents" for name in names), module


def test_importing_ntkdp_imports_nothing_heavy() -> None:
    code = (
        "import sys, ntkdp; "
        "heavy = {'jax', 'matplotlib', 'xarray', 'dp_accounting', 'neural_tangents', 'sklearn', "
        "'diffrax', 'tensorflow'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_face_is_whole() -> None:
    import ntkdp

    assert {name for name in ntkdp.__all__ if not hasattr(ntkdp, name)} == set()


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_name_that_is_used_exists(path: Path) -> None:
    # Neither mypy nor ruff can tell: shapes in annotations are names that do not exist either.
    module = importlib.import_module(
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    )
    pending = [compile(path.read_text(), str(path), "exec")]
    used = set()
    while pending:
        code = pending.pop()
        pending += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        used |= {op.argval for op in dis.get_instructions(code) if op.opname == "LOAD_GLOBAL"}
    assert used <= {*vars(module), *vars(builtins)}
