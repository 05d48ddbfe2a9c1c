"""Head, scheduler, block space and frontends. torch is never imported here."""
