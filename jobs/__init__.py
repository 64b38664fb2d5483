"""One thin, submittable entry point a stage; `python -m jobs` lists them."""
