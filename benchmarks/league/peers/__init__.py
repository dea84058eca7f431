"""The servers themselves, one small file each. They run in an environment of their own (`requirements.txt`) and know
nothing of this project but what `serving` reads from `LEAGUE_SETUP`; `mosec_stages` and `fastapi_torch` also import
`models`."""
