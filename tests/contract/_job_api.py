"""A stand-in for the job API of Ray's dashboard, over real HTTP and WebSockets; a test plays the cluster behind it.

What it answers was taken from Ray 2.60 (tests/ray/test_submit.py runs the same code against the real one).
"""

import asyncio
import importlib.metadata
import io
import threading
import time
import zipfile

from aiohttp import web


class JobApi:
    """The dashboard of a head without Ray. `play(job)` is called for each new job, and may set its status."""

    def __init__(self, *, token="", play=None):
        self.token = token
        self.play = play or (lambda job: job.update(status="RUNNING"))
        self.ray_version = importlib.metadata.version("ray")
        self.jobs = {}
        self.logs = {}
        self.packages = {}
        self.requests = []
        self.lost_answers = {}
        """Method and path -> so many answers are lost after what was asked has been done."""
        self.stop_hangs_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def end(self, job_id, status, *, exit_code=None, message=""):
        self.jobs[job_id].update(status=status, driver_exit_code=exit_code, message=message)

    def unpack(self, job_id):
        """Return the files that a job would find in its working directory."""
        uri = self.jobs[job_id]["runtime_env"]["working_dir"]
        with zipfile.ZipFile(io.BytesIO(self.packages[uri.removeprefix("gcs://")])) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def _serve(self):
        asyncio.set_event_loop(self._loop)
        app = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._get)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        app.router.add_route("*", "/api/packages/gcs/{name}", self._package)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    @web.middleware
    async def _guard(self, request, handler):
        what = f"{request.method} {request.path}"
        self.requests.append(what)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        answer = await handler(request)
        if self.lost_answers.get(what, 0):
            self.lost_answers[what] -= 1
            request.transport.abort()
        return answer

    async def _version(self, _):
        return web.json_response({"version": "4", "ray_version": self.ray_version})

    async def _list(self, _):
        return web.json_response([*self.jobs.values(), {"type": "DRIVER", "submission_id": None, "status": "RUNNING"}])

    async def _submit(self, request):
        fields = await request.json()
        job_id = fields["submission_id"]
        if job_id in self.jobs:  # as Ray does: a traceback, and 500
            text = f"Traceback ...\nValueError: Job with submission_id {job_id} already exists. Please use another.\n."
            return web.Response(status=500, text=text)
        job = {
            **fields,
            "type": "SUBMISSION",
            "status": "PENDING",
            "message": "",
            "start_time": int(time.time() * 1000),
        }
        self.jobs[job_id] = job
        self.logs.setdefault(job_id, "")
        self.play(job)
        return web.json_response({"submission_id": job_id})

    async def _get(self, request):
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.Response(status=404, text=f"Job {request.match_info['id']} does not exist")
        return web.json_response(job)

    async def _stop(self, request):
        await asyncio.sleep(self.stop_hangs_s)
        job = self.jobs[request.match_info["id"]]
        if not self.stop_hangs_s:
            job["status"] = "STOPPED"
        return web.json_response({"stopped": True})

    async def _tail(self, request):
        job_id = request.match_info["id"]
        stream = web.WebSocketResponse()
        await stream.prepare(request)
        sent = 0
        while True:
            has_ended = self.jobs[job_id]["status"] in ("SUCCEEDED", "FAILED", "STOPPED")
            if new := self.logs[job_id][sent:]:
                sent += len(new)
                await stream.send_str(new)
            elif has_ended:
                return stream
            await asyncio.sleep(0.02)

    async def _package(self, request):
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)
