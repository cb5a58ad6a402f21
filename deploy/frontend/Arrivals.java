package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.concurrent.LinkedBlockingDeque;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.atomic.AtomicBoolean;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.WorkerCommands;

/**
 * The queue of a model with asyncCommunication, which hands over what arrives instead of being asked for it.
 *
 * <p>Of the model's workers, the one that holds the fewest requests gets the next. All of it happens on the thread of a
 * worker's connection, which is one of those that read requests and write answers: after everything that it found to
 * read has been read, so what arrived together goes out together.
 */
final class Arrivals extends LinkedBlockingDeque<Job> {
    private static final long serialVersionUID = 1;
    private static final int SERVICE_UNAVAILABLE = 503;
    // Of one message: the worker begins to read a request only when it has the whole of it.
    private static final int MOST_IN_MESSAGE = 16;

    private final transient CopyOnWriteArrayList<AsyncBatchAggregator> workers = new CopyOnWriteArrayList<>();
    private final transient AtomicBoolean told = new AtomicBoolean();

    private Arrivals(int capacity) {
        super(capacity);
    }

    /** Those of a model, which take the place of its queue. TorchServe gives no access to that. */
    @SuppressWarnings("unchecked")
    static synchronized Arrivals of(Model model) {
        Map<String, LinkedBlockingDeque<Job>> queues;
        try {
            Field field = Model.class.getDeclaredField("jobsDb");
            field.setAccessible(true);
            queues = (Map<String, LinkedBlockingDeque<Job>>) field.get(model);
        } catch (ReflectiveOperationException error) {
            throw new IllegalStateException("This is not the Model of TorchServe 0.12.0", error);
        }
        LinkedBlockingDeque<Job> queue = queues.get(Model.DEFAULT_DATA_QUEUE);
        if (queue instanceof Arrivals) {
            return (Arrivals) queue;
        }
        Arrivals arrivals = new Arrivals(queue.size() + queue.remainingCapacity());
        queues.put(Model.DEFAULT_DATA_QUEUE, arrivals);
        queue.drainTo(arrivals);
        return arrivals;
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
            workers.remove(worker);
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
        while (jobs.size() < count) {
            Job job = peek();
            if (job == null || (isAlone(job) && !jobs.isEmpty())) {
                break;
            }
            remove();
            if (isLate(job)) {
                continue;
            }
            jobs.add(job);
            if (isAlone(job)) {
                break;
            }
        }
        return jobs;
    }

    /** Whether a job has a message of its own, as its command is the message's. */
    static boolean isAlone(Job job) {
        WorkerCommands command = job.getCmd();
        return command == WorkerCommands.DESCRIBE
                || command == WorkerCommands.STREAMPREDICT
                || command == WorkerCommands.STREAMPREDICT2;
    }

    /** Whether nobody waits for a job any more; whoever does is told. */
    static boolean isLate(Job job) {
        if (job.getPayload().getClientExpireTS() > System.currentTimeMillis()) {
            return false;
        }
        AsyncBatchAggregator.fail(
                job, SERVICE_UNAVAILABLE, "The request waited longer than clientTimeoutInMills allows.");
        return true;
    }
}
