"""Steps of `molora make`, a kind of plugin; `molora.synthetic.rows` has their contract."""
