"""The server: requests over HTTP, answered together by one model. Needs the extra `serve`."""
