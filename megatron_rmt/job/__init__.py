"""The seam to Megatron and the user: patches, flags, checks, the user's batch, files written.

The only folder that knows Megatron's command line and training loop; nothing imports it but the
package itself.
"""
