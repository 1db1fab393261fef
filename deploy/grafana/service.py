"""The panels about the service: whether it is up, how much and how fast it answers, how long the queue is."""

from __future__ import annotations

from deploy.grafana.panel import HERE, LATELY, MODEL, Panel, rate, stage, stat

OVERVIEW = (
    stat(
        "Ready",
        "none",
        "/readyz: an engine is alive and the models of PRELOAD are loaded. The worst replica.",
        f"min(instep_ready{{{HERE}}})",
        (None, "red"),
        (1, "green"),
        words=(("0", "no"), ("1", "yes")),
    ),
    stat(
        "Engines",
        "none",
        "Engine processes that are able to work, one for each device.",
        f"sum(instep_workers_live{{{HERE}}})",
        (None, "red"),
        (1, "green"),
    ),
    stat(
        "Images",
        "suffix: /s",
        "Images answered a second.",
        f"sum(rate(instep_images_total{{{MODEL}}}{LATELY}))",
    ),
    stat(
        "Latency, p95",
        "s",
        "From the request to its encoded images, in the last 5 minutes. The worst replica.",
        f"max(instance:instep_latency_seconds:p95_5m{{{HERE}}} >= 0)",
        (None, "green"),
        (30, "yellow"),
        (60, "red"),
    ),
    stat(
        "Queue",
        "s",
        "Device time ahead of a new request, on the fullest device. Scale by this. Above MAX_WAIT (120 s): 503.",
        f"max(instance:instep_queue_device_seconds:max{{{HERE}}})",
        (None, "green"),
        (30, "yellow"),
        (60, "red"),
    ),
    stat(
        "Failed",
        "percentunit",
        "Share of the accepted requests whose clients stayed, in the last 5 minutes. The worst replica.",
        f"max(instance:instep_failed_requests:ratio_rate5m{{{HERE}}} >= 0)",
        (None, "green"),
        (0.005, "yellow"),
        (0.02, "red"),
    ),
    stat(
        "Refused",
        "percentunit",
        "Share of all requests refused because there is no room (429, 503, 507), last 5 minutes. The worst replica.",
        f"max(instance:instep_refused_requests:ratio_rate5m{{{HERE}}} >= 0)",
        (None, "green"),
        (0.01, "yellow"),
        (0.05, "red"),
    ),
    stat(
        "Occupancy",
        "percentunit",
        "Passes of a denoising forward as a share of the widest one that pays on this device.",
        f"sum(rate(instep_batch_occupancy_ratio_sum{{{MODEL}}}{LATELY})) / "
        f"sum(rate(instep_batch_occupancy_ratio_count{{{MODEL}}}{LATELY}))",
    ),
)

TRAFFIC = (
    Panel(
        "Images answered", "suffix: /s", "Images a second.", ((rate("images_total", "model"), "{{model}}"),), stack=True
    ),
    Panel(
        "Requests by outcome",
        "reqps",
        "answered; failed after acceptance; cancelled by the client; refused before acceptance.",
        ((rate("requests_total", "outcome"), "{{outcome}}"),),
        stack=True,
    ),
    Panel(
        "Images in flight",
        "none",
        "running: in the last batch. waiting: accepted, not yet answered and not in a batch.",
        (
            (f"sum(instep_num_requests_running{{{MODEL}}})", "running"),
            (f"sum(instep_num_requests_waiting{{{MODEL}}})", "waiting"),
        ),
        stack=True,
    ),
)

LATENCY = (
    stage("Whole request", "e2e_request_latency_seconds", "From the request to its encoded images."),
    stage(
        "Queue", "request_queue_time_seconds", "From acceptance to the first step of an image, without text encoding."
    ),
    stage("Text encoding", "text_encode_seconds", "One forward of the text encoders or label embeddings."),
    stage("Denoising step", "denoise_step_seconds", "One forward of the network with its update. An image takes many."),
    stage("Image decoding", "vae_decode_seconds", "One forward of the VAE."),
    stage("Image encoding", "image_encode_seconds", "PNG, JPEG or WebP of one request, off the event loop."),
)

QUEUE = (
    Panel(
        "Images waiting",
        "none",
        "Accepted, not yet answered and not in a batch; those that wait for an engine process are apart.",
        (
            (f'sum by (model) (instep_num_requests_waiting_by_reason{{{MODEL}, reason="queue"}})', "{{model}}"),
            (f'sum(instep_num_requests_waiting_by_reason{{{MODEL}, reason="engine"}})', "no engine"),
        ),
        stack=True,
    ),
    Panel(
        "Device seconds queued",
        "s",
        "Estimated device time of the unanswered requests, by worker. The signal to scale by.",
        ((f"instep_queue_device_seconds{{{HERE}}}", "{{instance}} worker {{worker}}"),),
        limits=((None, "green"), (60, "red")),
    ),
    Panel(
        "Refusals by reason",
        "reqps",
        "Error codes of refused requests. overloaded, no_worker and the like need room; clients caused the rest.",
        ((rate("requests_rejected_total", "reason"), "{{reason}}"),),
        stack=True,
    ),
)

FRONT = (
    Panel(
        "Front: memory",
        "bytes",
        "Resident memory of the process that speaks HTTP; engines are processes of their own.",
        ((f'process_resident_memory_bytes{{job="instep", {HERE}}}', "{{instance}}"),),
    ),
    Panel(
        "Front: processor",
        "percentunit",
        "100 % is one core. Near that, every answer is late.",
        ((f'rate(process_cpu_seconds_total{{job="instep", {HERE}}}{LATELY})', "{{instance}}"),),
        limits=((None, "green"), (0.9, "red")),
    ),
    Panel(
        "Front: time of a scrape",
        "s",
        "The front writes /metrics in a thread. A slow scrape means that the front has too little processor time.",
        ((f'scrape_duration_seconds{{job="instep", {HERE}}}', "{{instance}}"),),
        limits=((None, "green"), (1, "red")),
    ),
)
