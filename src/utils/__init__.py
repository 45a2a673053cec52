"""What every script stands on: data (images), models (networks), metrics, run (folders), draw."""
