"""Packaging of phi-mm: `pip install .` for inference, `pip install ".[train,app,eval,dev]"` for
everything.
"""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "accelerate>=1.15",
    "huggingface_hub>=2.4",
    "librosa>=0.11",
    "numpy>=1.26",
    "packaging>=24.0",
    "pillow>=11.3",
    "soundfile>=0.13",
    "soxr>=0.5",
    "torch>=2.6",
    "transformers>=5.23",
]
EXTRAS = {
    "train": [
        "bitsandbytes>=0.50",
        "datasets>=5.0",
        "espeakng-loader>=0.2",
        "jinja2>=3.1",
        "peft>=0.21",
        "pyyaml>=6.0",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "trackio>=0.40",
        "xxhash>=3.5",
    ],
    "eval": [
        "datasets>=5.0",
        "evaluate>=0.4.6",
        "jinja2>=3.1",
        "jiwer>=4.0",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    "app": [
        "bitsandbytes>=0.50",
        "gradio[mcp]>=6.31",
        "pandas>=2.2",
        "peft>=0.21",
        "prometheus-client>=0.22",
        "psutil>=5.9",
        "starlette>=1.0",
    ],
    "docs": [
        "mkdocs-material>=9.5",
    ],
    "dev": [
        "axe-playwright-python>=0.1.8",
        "httpx>=0.27",
        "hypothesis>=6.100",
        "mcp>=1.21",
        "playwright>=1.55",
        "promql-parser>=0.12",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
    ],
}

setup(
    name="phi-mm",
    version="0.1.0",
    description="A Phi language model that sees and hears: train, measure and ship your own",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["modeling_phi_mm", "processing", "phi_mm", "phi_mm.*"]),
    package_data={
        "processing": ["*.jinja"],
        "phi_mm.datasets": ["*.jinja"],
        "phi_mm.evaluation": ["*.jinja"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["phi-mm = phi_mm.cli:main"]},
)
