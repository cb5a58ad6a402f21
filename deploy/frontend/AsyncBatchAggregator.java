package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.Semaphore;
import java.util.concurrent.TimeUnit;
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
 * never answers those that a worker held when it died; hands over any number of them; and one in each message. This
 * one answers them all, holds at most as many as the model's batchSize, and sends whatever has arrived together,
 * without waiting for more. Of a model's workers, the one that holds the fewest takes what comes next.
 */
public class AsyncBatchAggregator extends BatchAggregator {
    private static final Logger logger = LoggerFactory.getLogger(AsyncBatchAggregator.class);
    private static final int SERVICE_UNAVAILABLE = 503;
    // Of one message: the worker begins to read a request only when it has the whole of it.
    private static final int MOST_IN_MESSAGE = 16;
    private static final int CHECKED_EVERY_S = 1;
    // The longest that a worker leaves a request to another one, which may have ended since.
    private static final int TURN_MS = 20;
    // Milliseconds that a request has waited here; deadlines count from when it came.
    private static final String QUEUED_HEADER = "torchport-queued-ms";
    private static final String STREAM_NEXT_HEADER = "ts_stream_next";

    private final Map<String, Job> held = new ConcurrentHashMap<>();
    private final Semaphore room;
    private final LinkedBlockingDeque<Job> queue;

    public AsyncBatchAggregator(Model model) {
        super(model);
        room = new Semaphore(Math.max(1, model.getBatchSize()));
        queue = queueOf(model);
    }

    /** Waits for the next request, and takes those that have arrived with it. */
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
        ModelInferenceRequest request = new ModelInferenceRequest(model.getModelName());
        Job first = firstJob();
        int share = Math.min(share(), MOST_IN_MESSAGE);
        add(first, request);
        if (isAlone(first)) {
            return request;
        }
        for (int i = 1; i < share && room.tryAcquire(); i++) {
            Job job = queue.poll();
            while (job != null && isLate(job)) {
                job = queue.poll();
            }
            if (job != null && isAlone(job)) {
                if (!queue.offerFirst(job)) {
                    fail(job, SERVICE_UNAVAILABLE, "The queue is full.");
                }
                job = null;
            }
            if (job == null) {
                room.release();
                break;
            }
            add(job, request);
        }
        return request;
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

    /**
     * Waits for room and for a job.
     *
     * <p>Not for ever at a time: the thread that runs this is interrupted once when its worker dies, and where it
     * waits for something else just then, TorchServe forgets about it.
     */
    private Job firstJob() throws InterruptedException {
        do {
            checkConnected();
        } while (!room.tryAcquire(CHECKED_EVERY_S, TimeUnit.SECONDS));
        Job job = null;
        try {
            while (job == null) {
                checkConnected();
                awaitTurn();
                job = queue.poll(CHECKED_EVERY_S, TimeUnit.SECONDS);
                if (job != null && isLate(job)) {
                    job = null;
                }
            }
        } finally {
            if (job == null) {
                room.release();
            }
        }
        return job;
    }

    /**
     * Lets workers that hold fewer requests take the next one, for a moment.
     *
     * <p>Otherwise one worker may hold what would keep another one busy: what came cannot be taken back.
     */
    private void awaitTurn() throws InterruptedException {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(TURN_MS);
        synchronized (queue) {
            while (fewestOfOthers() < held.size()) {
                long leftMs = TimeUnit.NANOSECONDS.toMillis(end - System.nanoTime());
                if (leftMs <= 0) {
                    return;
                }
                queue.wait(leftMs);
            }
        }
    }

    /** How many requests the least busy of the other workers holds; of none that is not ready for more. */
    private int fewestOfOthers() {
        int fewest = Integer.MAX_VALUE;
        for (AsyncBatchAggregator other : others()) {
            fewest = Math.min(fewest, other.held.size());
        }
        return fewest;
    }

    /** How many requests this worker may take, the one it has taken included, so that all hold about as many. */
    private int share() {
        List<AsyncBatchAggregator> others = others();
        int all = queue.size() + 1 + held.size();
        for (AsyncBatchAggregator other : others) {
            all += other.held.size();
        }
        int workers = others.size() + 1;
        return (all + workers - 1) / workers - held.size();
    }

    /** Those of the model's other workers that can take requests. */
    private List<AsyncBatchAggregator> others() {
        List<AsyncBatchAggregator> others = new ArrayList<>();
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            if (worker.aggregator != this
                    && worker.aggregator instanceof AsyncBatchAggregator
                    && worker.getState() == WorkerState.WORKER_MODEL_LOADED
                    && isConnected(worker)
                    && ((AsyncBatchAggregator) worker.aggregator).room.availablePermits() > 0) {
                others.add((AsyncBatchAggregator) worker.aggregator);
            }
        }
        return others;
    }

    private static boolean isConnected(WorkerThread worker) {
        return !worker.backendChannel.isEmpty() && worker.backendChannel.get(0).isActive();
    }

    private void checkConnected() throws InterruptedException {
        WorkerThread worker = worker();
        if (worker != null && !isConnected(worker)) {
            throw new InterruptedException("The worker is gone");
        }
    }

    /** The thread that asks this for requests. */
    private WorkerThread worker() {
        for (WorkerThread worker : ModelManager.getInstance().getWorkers(model.getModelVersionName())) {
            if (worker.aggregator == this) {
                return worker;
            }
        }
        return null;
    }

    private void add(Job job, ModelInferenceRequest request) {
        if (isAlone(job)) {
            request.setCommand(job.getCmd());
        }
        if (job.getJobId() == null) {
            // Pipelined: the answer to the request before it has taken its session, and its id with that.
            job.getPayload().setRequestId(UUID.randomUUID().toString());
        }
        job.setScheduled();
        long queuedMs = (System.nanoTime() - job.getBegin()) / 1_000_000;
        job.getPayload().updateHeaders(QUEUED_HEADER, Long.toString(queuedMs));
        // Before the worker can know of it, and so before it can answer.
        held.put(job.getJobId(), job);
        request.addRequest(job.getPayload());
        passTurn();
    }

    /** Lets whoever waits for its turn look again. */
    private void passTurn() {
        synchronized (queue) {
            queue.notifyAll();
        }
    }

    /** Whether a job has a message of its own, as its command is the message's. */
    private static boolean isAlone(Job job) {
        WorkerCommands command = job.getCmd();
        return command == WorkerCommands.DESCRIBE
                || command == WorkerCommands.STREAMPREDICT
                || command == WorkerCommands.STREAMPREDICT2;
    }

    private static boolean isLate(Job job) {
        if (job.getPayload().getClientExpireTS() > System.currentTimeMillis()) {
            return false;
        }
        fail(job, SERVICE_UNAVAILABLE, "The request waited longer than clientTimeoutInMills allows.");
        return true;
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
            } else if (!isLate(job)) {
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
        } catch (RuntimeException error) {
            logger.warn("Cannot answer {}", job.getJobId(), error);
        }
    }

    private static void fail(Job job, int status, String message) {
        try {
            job.sendError(status, message);
        } catch (RuntimeException error) {
            logger.warn("Cannot answer {}", job.getJobId(), error);
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
            room.release();
            passTurn();
        }
        return job;
    }

    /** The model's queue, which has no accessor that does not wait for more than one request. */
    @SuppressWarnings("unchecked")
    private static LinkedBlockingDeque<Job> queueOf(Model model) {
        try {
            Field field = Model.class.getDeclaredField("jobsDb");
            field.setAccessible(true);
            return ((Map<String, LinkedBlockingDeque<Job>>) field.get(model)).get(Model.DEFAULT_DATA_QUEUE);
        } catch (ReflectiveOperationException error) {
            throw new IllegalStateException("This is not the Model of TorchServe 0.12.0", error);
        }
    }
}
