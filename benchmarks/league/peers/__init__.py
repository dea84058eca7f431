"""The other servers, one small file each. They run in their own environment (`requirements.txt`) and use nothing of
this project except the setup that `serving` reads from `LEAGUE_SETUP`; `mosec_stages` and `fastapi_torch` also import
`models`."""
