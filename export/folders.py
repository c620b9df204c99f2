"""Where the project keeps things."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
"""What commands make and can make again; not committed."""
