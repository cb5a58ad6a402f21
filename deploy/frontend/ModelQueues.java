package org.pytorch.serve.wlm;

import java.lang.reflect.Field;
import java.util.Map;
import java.util.concurrent.LinkedBlockingDeque;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.job.RestJob;

/** The queues of requests that TorchServe's models have, to which it gives no access. */
public final class ModelQueues {
    private ModelQueues() {}

    /** Those of a model, by name; its requests are in the one called {@code Model.DEFAULT_DATA_QUEUE}. */
    @SuppressWarnings("unchecked")
    static Map<String, LinkedBlockingDeque<Job>> of(Model model) {
        try {
            Field field = Model.class.getDeclaredField("jobsDb");
            field.setAccessible(true);
            return (Map<String, LinkedBlockingDeque<Job>>) field.get(model);
        } catch (ReflectiveOperationException error) {
            throw new IllegalStateException("This is not the Model of TorchServe 0.12.0", error);
        }
    }

    /** Takes out the requests whose clients have left, in whichever model's queue they are. */
    public static void removeAbandoned() {
        ModelManager manager = ModelManager.getInstance();
        manager.getAllModels().forEach(
                versions -> versions.getValue().getAllVersions().forEach(
                        version -> {
                            LinkedBlockingDeque<Job> queue = of(version.getValue()).get(Model.DEFAULT_DATA_QUEUE);
                            if (queue != null && !queue.isEmpty()) {
                                queue.removeIf(ModelQueues::isAbandoned);
                            }
                        }));
    }

    /** Whether the client of a request over HTTP has closed its connection. */
    static boolean isAbandoned(Job job) {
        // GRPCJob says the opposite of what it is asked; and a workflow's step has no client of its own.
        return job instanceof RestJob && !isOfWorkflow(job) && !job.isOpen();
    }

    /** Whether a request is a step of a workflow, which sends the same again when it fails. */
    static boolean isOfWorkflow(Job job) {
        return job instanceof RestJob && ((RestJob) job).getResponsePromise() != null;
    }
}
