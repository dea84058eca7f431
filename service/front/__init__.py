"""HTTP and decoding in processes of their own, in front of the one engine (`--http-workers`).

In the engine's process `supervisor` keeps the workers and `hub` speaks with them; in a worker's, `worker` serves the
HTTP face, whose engine is a `proxy`. Between them: images in `memory` that they share, and `wire` messages in a
`channel`.
"""
