"""Small pre-training runs that show which first stage transfers to dense attention. See README.md."""
