package org.pytorch.serve.wlm;

import io.netty.channel.Channel;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelInferenceRequest;
import org.pytorch.serve.util.messages.ModelLoadModelRequest;
import org.pytorch.serve.util.messages.ModelWorkerResponse;
import org.pytorch.serve.util.messages.Predictions;
import org.pytorch.serve.util.messages.RequestInput;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Hands requests to one worker as they come, and answers them as the worker does.
 *
 * <p>It takes the place of TorchServe 0.12.0's own class of this name, for models with asyncCommunication. That one
 * keeps the requests that a worker holds in a LinkedHashMap which two threads change, so it loses one now and then;
 * never answers those that a worker held when it died; and hands over any number of them, one in each message, from a
 * thread that waits for each and then for its message to be written. This one answers them all and holds at most as
 * many as the model's batchSize. Requests come from the model's {@link Arrivals}, which tell the worker's connection:
 * the thread of that connection hands over whatever has arrived, without another thread in between.
 */
public class AsyncBatchAggregator extends BatchAggregator {
    private static final Logger logger = LoggerFactory.getLogger(AsyncBatchAggregator.class);
    private static final int SERVICE_UNAVAILABLE = 503;
    private static final int INTERNAL_ERROR = 500;
    private static final int CHECKED_EVERY_MS = 1000;
    // Milliseconds that a request has waited here; deadlines count from when it came.
    private static final String QUEUED_HEADER = "torchport-queued-ms";
    private static final String STREAM_NEXT_HEADER = "ts_stream_next";

    private final Map<String, Job> held = new ConcurrentHashMap<>();
    private final int most;
    private final Arrivals arrivals;
    private volatile Channel channel;

    public AsyncBatchAggregator(Model model) {
        super(model);
        most = Math.max(1, model.getBatchSize());
        arrivals = Arrivals.of(model);
    }

    /**
     * The request to load the model. Afterwards the thread that asks has nothing to do until its worker ends.
     *
     * <p>It does not wait for ever at a time: it is interrupted once when its worker dies, and where it waits for
     * something else just then, TorchServe forgets about it.
     */
    @Override
    public BaseModelRequest getRequest(String workerId, WorkerState state) throws InterruptedException {
        Job load = loadJob(workerId);
        if (state != WorkerState.WORKER_MODEL_LOADED) {
            if (load == null) {
                throw new InterruptedException("The worker has not loaded its model");
            }
            String gpu = load.getPayload().getStringParameter("gpu");
            return new ModelLoadModelRequest(model, gpu == null ? -1 : Integer.parseInt(gpu));
        }
        WorkerThread worker = worker();
        if (worker == null || worker.backendChannel.isEmpty()) {
            throw new InterruptedException("The worker is gone");
        }
        channel = worker.backendChannel.get(0);
        arrivals.join(this);
        while (channel.isActive()) {
            Thread.sleep(CHECKED_EVERY_MS);
        }
        throw new InterruptedException("The worker is gone");
    }

    /**
     * The worker's job to load its model, if there is one.
     *
     * <p>Each start of a worker adds one. A worker that ended before it took its own leaves it to its successor, which
     * must not get both: the second would reach it when it has loaded and expects requests only.
     */
    private Job loadJob(String workerId) throws InterruptedException {
        Job last = null;
        jobs.clear();
        while (model.pollMgmtJob(workerId, 0, jobs)) {
            last = jobs.values().iterator().next();
            jobs.clear();
        }
        return last;
    }

    /** The thread that asks this for requests. */
    private WorkerThread worker() {
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            // TorchServe copies a list that another thread may be making shorter.
            if (worker != null && worker.aggregator == this) {
                return worker;
            }
        }
        return null;
    }

    /** The connection to the worker, once it has loaded its model. */
    Channel channel() {
        return channel;
    }

    /** How many requests the worker holds. */
    int load() {
        return held.size();
    }

    /** How many requests more it may be given now: none while much of what it was given has not gone out. */
    int room() {
        return channel.isActive() && channel.isWritable() ? most - held.size() : 0;
    }

    /** Gives the worker requests, in one message; called by one thread at a time. */
    void handOver(List<Job> taken) {
        ModelInferenceRequest request = new ModelInferenceRequest(model.getModelName());
        for (Job job : taken) {
            if (Arrivals.isAlone(job)) {
                request.setCommand(job.getCmd());
            }
            if (job.getJobId() == null) {
                // Its connection has no session any more. One without an id would fail the others of the message.
                job.getPayload().setRequestId(UUID.randomUUID().toString());
            }
            job.setScheduled();
            long queuedMs = (System.nanoTime() - job.getBegin()) / 1_000_000;
            job.getPayload().updateHeaders(QUEUED_HEADER, Long.toString(queuedMs));
            // Before the worker can know of it, and so before it can answer.
            held.put(job.getJobId(), job);
            request.addRequest(job.getPayload());
        }
        channel.writeAndFlush(request).addListener(sent -> {
            // Nobody reads them any more, and a client that leaves does not take them along.
            for (Job job : taken) {
                if (!ModelQueues.isOfWorkflow(job)) {
                    job.getPayload().setParameters(List.of());
                }
            }
            if (!sent.isSuccess()) {
                sendError(request, "The worker could not be given the request.", SERVICE_UNAVAILABLE);
            }
            if (channel.isWritable()) {
                arrivals.tell();
            } else {
                // Netty says that the bytes are written before it counts them as written.
                channel.eventLoop().execute(arrivals::tell);
            }
        });
    }

    @Override
    public boolean sendResponse(ModelWorkerResponse message) {
        List<Predictions> predictions = message.getPredictions();
        if (message.getCode() != 200) {
            failAll(message.getCode(), message.getMessage());
            return true;
        }
        if (predictions == null) {
            return true;
        }
        for (Predictions prediction : predictions) {
            Job job = release(prediction.getRequestId());
            if (job == null) {
                logger.error("The worker answered {}, which it does not hold", prediction.getRequestId());
            } else if (Arrivals.isLate(job)) {
                Arrivals.failLate(job);
            } else {
                answer(job, prediction);
            }
        }
        return true;
    }

    @Override
    public void sendError(BaseModelRequest message, String error, int status) {
        if (message instanceof ModelLoadModelRequest) {
            logger.warn("Load model failed: {}, error: {}", message.getModelName(), error);
        } else if (message instanceof ModelInferenceRequest) {
            for (RequestInput input : ((ModelInferenceRequest) message).getRequestBatch()) {
                Job job = release(input.getRequestId());
                if (job != null) {
                    // Whatever it died of, nothing was wrong with the request, and another worker may answer it.
                    fail(job, SERVICE_UNAVAILABLE, error);
                }
            }
        } else {
            failAll(status, error);
        }
    }

    /** Called when the worker has died: whatever it held is answered, and its replacement has to load. */
    @Override
    public void cleanJobs() {
        jobs.clear();
        arrivals.leave(this);
        failAll(SERVICE_UNAVAILABLE, "Worker died.");
        WorkerThread worker = worker();
        if (worker instanceof AsyncWorkerThread) {
            // Never set back by TorchServe: it would hand requests to the next process before that has loaded, and
            // report it as unloading for ever.
            ((AsyncWorkerThread) worker).loadingFinished = false;
        }
    }

    /** One client that is gone must not keep others from their answers. */
    private static void answer(Job job, Predictions prediction) {
        Map<String, String> headers = prediction.getHeaders();
        if (job.getCmd() == WorkerCommands.STREAMPREDICT) {
            // Of gRPC. The one answer is the whole stream; without this its client would wait for more for ever.
            headers = headers == null ? new HashMap<>() : new HashMap<>(headers);
            headers.put(STREAM_NEXT_HEADER, "false");
        }
        try {
            job.response(
                    prediction.getResp(),
                    prediction.getContentType(),
                    prediction.getStatusCode(),
                    prediction.getReasonPhrase(),
                    headers);
        } catch (Throwable error) { // an answer without memory for it, too, must not keep the next from theirs
            logger.warn("Cannot answer {}", job.getJobId(), error);
            fail(job, INTERNAL_ERROR, "The answer could not be written.");
        }
    }

    static void fail(Job job, int status, String message) {
        try {
            job.sendError(status, message);
        } catch (Throwable error) {
            logger.warn("Cannot refuse {}", job.getJobId(), error);
        }
    }

    private void failAll(int status, String error) {
        for (String id : held.keySet()) {
            Job job = release(id);
            if (job != null) {
                fail(job, status, error);
            }
        }
    }

    private Job release(String id) {
        Job job = held.remove(id);
        if (job != null) {
            arrivals.tell();
        }
        return job;
    }
}
