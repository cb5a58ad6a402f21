package org.pytorch.serve.wlm;

import java.lang.ref.WeakReference;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.InputParameter;
import org.pytorch.serve.util.messages.WorkerCommands;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The queue of a model with asyncCommunication, which hands over what arrives instead of being asked for it.
 *
 * <p>Of the model's workers, the one that holds the fewest requests gets the next. All of it happens on the thread of a
 * worker's connection, which is one of those that read requests and write answers: after everything that it found to
 * read has been read, so what arrived together goes out together.
 */
final class Arrivals extends LinkedBlockingDeque<Job> {
    private static final long serialVersionUID = 1;
    private static final Logger logger = LoggerFactory.getLogger(Arrivals.class);
    private static final int SERVICE_UNAVAILABLE = 503;
    // Of one message: the worker begins to read a request only when it has the whole of it.
    private static final int MOST_IN_MESSAGE = 16;
    // Of bodies, after which a message takes no more: while it is written, it lies in memory a second time.
    private static final long ENOUGH_BYTES = 1 << 20;
    private static final int CHECKED_EVERY_S = 1;
    // A worker that ended is back within seconds, unless its model cannot be loaded any more.
    private static final long WITHOUT_WORKER_NS =
            TimeUnit.SECONDS.toNanos(Long.getLong("torchport.withoutWorkerSeconds", 30));

    private final transient CopyOnWriteArrayList<AsyncBatchAggregator> workers = new CopyOnWriteArrayList<>();
    private final transient AtomicBoolean told = new AtomicBoolean();
    private transient volatile long workerlessSinceNs = System.nanoTime();

    private Arrivals(int capacity) {
        super(capacity);
    }

    /** Those of a model, which take the place of its queue. */
    static synchronized Arrivals of(Model model) {
        Map<String, LinkedBlockingDeque<Job>> queues = ModelQueues.of(model);
        LinkedBlockingDeque<Job> queue = queues.get(Model.DEFAULT_DATA_QUEUE);
        if (queue instanceof Arrivals) {
            return (Arrivals) queue;
        }
        Arrivals arrivals = new Arrivals(queue.size() + queue.remainingCapacity());
        queues.put(Model.DEFAULT_DATA_QUEUE, arrivals);
        queue.drainTo(arrivals);
        lookAgain(new WeakReference<>(arrivals)); // until the model is gone
        return arrivals;
    }

    private static void lookAgain(WeakReference<Arrivals> reference) {
        ModelManager.getInstance()
                .getScheduler()
                .schedule(
                        () -> {
                            Arrivals arrivals = reference.get();
                            if (arrivals == null) {
                                return;
                            }
                            try {
                                arrivals.refuseHopeless();
                            } catch (Throwable error) { // whatever it was, the next look may find more memory
                                logger.warn("Cannot look through a queue", error);
                            }
                            lookAgain(reference);
                        },
                        CHECKED_EVERY_S,
                        TimeUnit.SECONDS);
    }

    @Override
    public boolean offer(Job job) {
        boolean taken = super.offer(job);
        if (taken) {
            tell();
        }
        return taken;
    }

    /** A worker is ready for requests. */
    void join(AsyncBatchAggregator worker) {
        synchronized (workers) {
            workers.addIfAbsent(worker);
        }
        tell();
    }

    /** A worker is gone: once this has returned, nothing is given to it. */
    void leave(AsyncBatchAggregator worker) {
        synchronized (workers) {
            if (workers.remove(worker) && workers.isEmpty()) {
                workerlessSinceNs = System.nanoTime();
            }
        }
        tell();
    }

    /** Something has arrived, or there is room again. */
    void tell() {
        if (isEmpty()) {
            return;
        }
        for (AsyncBatchAggregator worker : workers) {
            if (worker.room() <= 0) {
                continue;
            }
            if (told.compareAndSet(false, true)) {
                try {
                    worker.channel().eventLoop().execute(this::handOver);
                } catch (RejectedExecutionException stopping) {
                    told.set(false);
                }
            }
            return;
        }
    }

    private void handOver() {
        told.set(false);
        synchronized (workers) {
            while (!isEmpty()) {
                AsyncBatchAggregator worker = leastBusy();
                if (worker == null) {
                    return;
                }
                List<Job> jobs = take(Math.min(share(worker), Math.min(worker.room(), MOST_IN_MESSAGE)));
                if (!jobs.isEmpty()) {
                    worker.handOver(jobs);
                }
            }
        }
    }

    private AsyncBatchAggregator leastBusy() {
        AsyncBatchAggregator least = null;
        for (AsyncBatchAggregator worker : workers) {
            if (worker.room() > 0 && (least == null || worker.load() < least.load())) {
                least = worker;
            }
        }
        return least;
    }

    /** How many requests a worker may take, so that all hold about as many: one that is taken cannot be taken back. */
    private int share(AsyncBatchAggregator one) {
        int all = size();
        int ready = 0;
        for (AsyncBatchAggregator worker : workers) {
            if (worker.room() > 0) {
                all += worker.load();
                ready++;
            }
        }
        return Math.max(1, (all + ready - 1) / Math.max(1, ready) - one.load());
    }

    private List<Job> take(int count) {
        List<Job> jobs = new ArrayList<>();
        long bytes = 0;
        while (jobs.size() < count && bytes < ENOUGH_BYTES) {
            Job job = peek();
            if (job == null || (isAlone(job) && !jobs.isEmpty())) {
                break;
            }
            if (!remove(job) || ModelQueues.isAbandoned(job)) {
                continue;
            }
            if (isLate(job)) {
                failLate(job);
                continue;
            }
            jobs.add(job);
            for (InputParameter part : job.getPayload().getParameters()) {
                bytes += part.getValue().length;
            }
            if (isAlone(job)) {
                break;
            }
        }
        return jobs;
    }

    /** Answers what has waited too long: for its client, or for a worker while there is none. */
    private void refuseHopeless() {
        long nowNs = System.nanoTime();
        boolean workerless = workers.isEmpty() && nowNs - workerlessSinceNs > WITHOUT_WORKER_NS;
        for (Job job : toArray(new Job[0])) {
            boolean late = isLate(job);
            boolean alone = workerless && nowNs - job.getBegin() > WITHOUT_WORKER_NS;
            // Whoever takes it out, and nobody else, answers it.
            if ((late || alone) && remove(job)) {
                if (late) {
                    failLate(job);
                } else {
                    AsyncBatchAggregator.fail(job, SERVICE_UNAVAILABLE, "No worker of the model is ready; try again.");
                }
            }
        }
    }

    /** Whether a job has a message of its own, as its command is the message's. */
    static boolean isAlone(Job job) {
        WorkerCommands command = job.getCmd();
        return command == WorkerCommands.DESCRIBE
                || command == WorkerCommands.STREAMPREDICT
                || command == WorkerCommands.STREAMPREDICT2;
    }

    /** Whether nobody waits for a job any more. */
    static boolean isLate(Job job) {
        return job.getPayload().getClientExpireTS() <= System.currentTimeMillis();
    }

    static void failLate(Job job) {
        AsyncBatchAggregator.fail(
                job, SERVICE_UNAVAILABLE, "The request waited longer than clientTimeoutInMills allows.");
    }
}
