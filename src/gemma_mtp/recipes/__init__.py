"""How other runtimes decode a pair: recipes as data (`runtimes/*.toml`), filled in for a pair and a machine."""
