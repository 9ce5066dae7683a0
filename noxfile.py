"""The project's commands; ``python -m nox -l`` lists them."""

import os
import shutil
import sys
import tarfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "docs"]

PROJECT = nox.project.load_toml("pyproject.toml")

# The libraries that benchmarks/ measures beside tdcache. None is needed: the bench runs with those it finds.
PEERS = ("captum", "nnsight", "transformer-lens", "pyvene", "tdhook==0.1.3", "zennit", "datasets")

# Those that the tests hold it against, and where.
TESTED_PEERS = ("aiohttp", "captum", "datasets", "ray", "transformer-lens")
PEER_TESTS = (
    "tests/attribution/test_captum.py",
    "tests/attribution/test_lrp.py",
    "tests/harvesting/test_ray_fleet.py",
    "tests/harvesting/test_sources.py",
    "tests/naming/test_transformer_lens.py",
    "tests/points/test_transformer_lens.py",
    "tests/residual/test_transformer_lens.py",
    "tests/store/test_dataset.py",
    "tests/store/test_remote.py",
    "tests/store/test_repack.py",
)

# Those that tests/validator/ puts its requests to, beside hooks by hand and a class in the style of baukit.
VALIDATED_PEERS = ("captum", "nnsight", "transformer-lens", "pyvene", "torchlens")

# What shows that an installed wheel is whole: imports, contexts, the pages' code, and a part that needs transformers.
DIST_TESTS = ("tests/architecture", "tests/contexts", "tests/test_front_door.py", "tests/test_validator.py")

# What needs nothing but torch and tensordict.
VERSION_TESTS = ("tests/hooks", "tests/contexts", "tests/cache", "tests/test_caching.py", "tests/test_selection.py")
OLDEST, NEWEST = ("torch==2.6.*", "tensordict==0.7.*"), ("torch", "tensordict")

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# The kernels of the oldest CPU that torch runs on. MKL heeds the first variable on Intel's CPUs alone.
LOWEST_INSTRUCTION_SET = {
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ATEN_CPU_CAPABILITY": "default",
}
# The noise of tests/other_cpu.py, which makes two batch sizes differ on every CPU.
ROUNDING_NOISE = {"TDCACHE_OTHER_CPU": "1"}
# A nox of its own runs ``tests``: it can take that session's environment as it is, and makes it if none is there.
NOX_TESTS = ("-m", "nox", "--reuse-existing-virtualenvs", "--no-install", "--session", "tests")


def install(session, *requirements, **options):
    """Install pinned versions: without the constraints pip would take the newest torch, gigabytes of it."""
    session.install("--disable-pip-version-check", "-c", "constraints.txt", *requirements, **options)


def install_group(session, group, *requirements):
    """Install one dependency group of pyproject.toml, and what else is asked for, in a single resolution."""
    install(session, *nox.project.dependency_groups(PROJECT, group), *requirements)


def run_script(session, requirement, path, *defaults):
    """Run a script of the checkout; arguments after ``--`` take the place of ``defaults``."""
    install(session, "-e", requirement)
    session.run("python", path, *(session.posargs or defaults), env=OFFLINE)


@nox.session
def demo(session):
    """Run the quickstart on real weights: prints the selection, writes a picture."""
    install(session, ".[examples]")
    session.run("python", "examples/quickstart.py", *session.posargs, env=OFFLINE)


@nox.session
def tests(session):
    """Run tests, doctests and the README's blocks; arguments after ``--`` go to pytest."""
    # Editable, so that the doctests of src/ and the tests see one and the same package.
    install_group(session, "tests", "-e", ".[examples]")
    workers = str(min(os.cpu_count() or 1, 4))  # each imports torch: more than four only costs memory
    session.run("python", "-m", "pytest", "-n", workers, "--dist", "worksteal", *session.posargs, env=OFFLINE)


@nox.session
def fuzz(session):
    """Hold ten thousand random captures against hooks written with torch alone."""
    run_script(session, ".", "tests/differential.py", "--cases", "10000")


@nox.session
def matrix(session):
    """Every module of twenty families of models under every method, against hooks written by hand."""
    install_group(session, "tests", "-e", ".[examples]")
    env = {**OFFLINE, "TDCACHE_MATRIX": "all"}
    session.run("python", "-m", "pytest", "tests/models/test_matrix.py", *session.posargs, env=env)


@nox.session
def kills(session):
    """Kill a thousand processes that write stores, copies and states, and hold what is left against one whole run."""
    run_script(session, ".", "tests/kills.py", "--kills", "1000")


@nox.session
def soak(session):
    """Take fifty million rows through everything that reads and writes them: each is checked, memory is measured."""
    run_script(session, ".[examples]", "benchmarks/soak.py", "--rows", "50000000")


@nox.session
def names_zoo(session):
    """Find and prove canonical names in 224 families of transformers; writes docs/names_table.md."""
    run_script(session, ".[examples]", "tests/names_zoo.py")


@nox.session
def residual_zoo(session):
    """Take the residual streams of 224 families of transformers apart; every sum has to be exact, or refused."""
    run_script(session, ".[examples]", "tests/residual_zoo.py")


@nox.session
def names_lies(session):
    """Plant wrong names in 224 families of transformers; every one has to be refused."""
    run_script(session, ".[examples]", "tests/names_lies.py")


@nox.session
def call_zoo(session):
    """Hold the places inside the attention of every family of transformers that builds against an eager twin."""
    install_group(session, "tests", "-e", ".")
    session.run("python", "tests/call_zoo.py", *session.posargs, env=OFFLINE)


@nox.session(venv_backend="none")
def other_cpu(session):
    """Run ``tests`` with the kernels of the oldest CPU: what asks for too many equal bits fails here."""
    session.run(sys.executable, *NOX_TESTS, "--", *session.posargs, env=LOWEST_INSTRUCTION_SET)


@nox.session(venv_backend="none")
def rounding_noise(session):
    """Run ``tests`` with noise in the last bits, another for each shape: stricter than a CPU, not a part of CI."""
    session.run(sys.executable, *NOX_TESTS, "--", *session.posargs, env=ROUNDING_NOISE)


@nox.session
def peers(session):
    """Run the tests that hold tdcache against other libraries, which are installed for it."""
    install_group(session, "tests", "-e", ".[examples]", *TESTED_PEERS)
    install(session, "--no-deps", "zennit")  # which needs no torchvision for its rules
    # A peer may bring a torchvision built for another torch, which breaks `import transformers`; none needs it here.
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision")
    session.run("python", "-m", "pytest", *PEER_TESTS, *session.posargs, env=OFFLINE)


@nox.session
def validate(session):
    """Put the same requests to tdcache, to other libraries and to hooks by hand, and write docs/validator.md."""
    install_group(session, "tests", "-e", ".[examples]")
    for peer in VALIDATED_PEERS:
        install(session, peer, success_codes=range(256))  # the page names what cannot be had
    # A peer may bring a torchvision built for another torch, which breaks `import transformers`; none needs it here.
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision")
    options = session.posargs or ("--page", "docs/validator.md")
    session.run("python", "-W", "ignore", "-m", "validator", *options, env={**OFFLINE, "PYTHONPATH": "tests"})


@nox.session
def lens_tests(session):
    """Run TransformerLens' own tests on tdcache's hook points; ``-- --source PATH`` takes a checkout of it."""
    install_group(session, "tests", "-e", ".", "transformer-lens")
    env = {**OFFLINE, "PYTHONPATH": "tests"}
    session.run("python", "-W", "ignore", "-m", "validator.lens_tests", *session.posargs, env=env)


@nox.session
def dist(session):
    """Build sdist and wheel, install the wheel, and run a part of the tests in the unpacked sdist."""
    install(session, "build")
    folder = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(folder), ".")  # the wheel is built from the sdist
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    install_group(session, "tests", str(wheel))
    install(session, "--force-reinstall", "--no-deps", str(wheel))  # a reused environment holds an earlier one
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    session.chdir(folder / sdist.name.removesuffix(".tar.gz"))
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or DIST_TESTS), env=OFFLINE)


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["oldest", "newest"])
def versions(session, torch):
    """Run a part of the tests with the oldest torch and tensordict that are supported, and with the newest.

    pip takes torch from where its settings say: set PIP_EXTRA_INDEX_URL to an index of CPU builds, for those of PyPI
    bring gigabytes of CUDA. What cannot be installed is skipped with the reason.
    """
    pins = OLDEST if torch == "oldest" else NEWEST
    try:
        session.install("--disable-pip-version-check", "--only-binary", "torch,tensordict", *pins, "pytest", "-e", ".")
    except nox.command.CommandFailed:
        session.skip(f"no wheels of {' and '.join(pins)} for Python {session.python} on this package index")
    session.run("python", "-m", "pytest", "-p", "no:cacheprovider", *(session.posargs or VERSION_TESTS), env=OFFLINE)


@nox.session
def notebooks(session):
    """Execute the gallery's notebooks where the built documentation offers them for download; run ``docs`` before."""
    install(session, ".[examples]", "ipykernel", "nbconvert")
    found = sorted(str(path) for path in Path("docs", "_build", "html", "_downloads").glob("*/*.ipynb"))
    if not found:
        session.error("there are no notebooks in docs/_build/html: run `python -m nox -s docs` first")
    session.run("jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", *found, env=OFFLINE)


@nox.session
def lint(session):
    """Check style and formatting."""
    install_group(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session):
    """Check the package's annotations, strictly."""
    install_group(session, "types", ".")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session):
    """Build the documentation, executing every example; any warning fails."""
    install_group(session, "docs", ".[examples]")
    build = Path("docs", "_build")
    session.run(
        *("python", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--fresh-env"),
        *("-b", "html", "-d", str(build / "doctrees"), *session.posargs, "docs", str(build / "html")),
        env=OFFLINE,
    )


@nox.session
def bench(session):
    """Measure tdcache beside its peers, as ratios in one process; arguments after ``--`` go to the script."""
    install(session, ".[examples]")
    for peer in PEERS:
        install(session, peer, success_codes=range(256))  # a peer that cannot be had leaves its column out
    # A peer may bring a torchvision built for another torch, which breaks `import transformers`; none needs it here.
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision")
    session.run("python", "benchmarks/run.py", *session.posargs, env=OFFLINE)
