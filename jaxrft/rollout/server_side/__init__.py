"""What runs inside a rollout server's own environment: modules that import neither JAX nor our packages.

This folder is put on the server's ``PYTHONPATH``, where its modules go by their own names.
"""
