package org.pytorch.serve;

import io.netty.channel.ChannelDuplexHandler;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelPipeline;
import io.netty.channel.ChannelPromise;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpContent;
import io.netty.handler.codec.http.HttpExpectationFailedEvent;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpObjectAggregator;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.ReferenceCountUtil;
import io.netty.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.NettyUtils;
import org.pytorch.serve.wlm.ModelQueues;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * Bounds the bytes of all request bodies that have no answer yet, and the wait for the next part of one.
 *
 * <p>TorchServe bounds the number of requests and the size of each; together they may hold many times the memory that
 * Java has, and a client that stops in the middle holds its part for ever. A body counts as it arrives, not as its
 * header announces it. The one that finds no room gets 503 when it has been read to its end and thrown away; whatever
 * else is in flight goes on. The one that does not arrive gets 408.
 *
 * <p>One of these sits in the pipeline of each connection, before the aggregator, which would keep the body.
 */
final class Uploads extends ChannelDuplexHandler {
    private static final String AGGREGATOR = "aggregator";
    private static final Logger logger = LoggerFactory.getLogger(Uploads.class);
    // A body lies in Java's memory up to three times: as it arrived, as the job's bytes, as the message to the worker.
    // A quarter leaves room for answers and for what Java itself needs.
    private static final long MOST = Runtime.getRuntime().maxMemory() / 4;
    // So that some large bodies, or some clients that take their time, do not keep everybody out.
    private static final long ALWAYS_ROOM_FOR = 16 << 10;
    private static final long STALLED_NS = TimeUnit.SECONDS.toNanos(Long.getLong("torchport.uploadStallSeconds", 60));
    private static final String RETRY_AFTER_S = "1";
    private static final String NO_ROOM =
            "{\"error\": {\"code\": \"overloaded\", \"message\": \"The requests in flight leave no room for a body of "
                    + "this size; try again in a moment.\"}}";
    private static final String STALLED =
            "{\"error\": {\"code\": \"upload_stalled\", \"message\": \"Nothing more of the body came for too long; "
                    + "send it again.\"}}";

    private static final AtomicLong TAKEN = new AtomicLong();

    // All used by the connection's own thread only, and of one request: InOrder lets in no other before its answer.
    private HttpRequest request;
    private boolean unanswered;
    private long mine;
    private boolean refusing;
    private boolean reading;
    private long readAtNs;
    private Future<?> watch;

    /** Puts one of these into a pipeline, with the aggregator behind it. */
    static void addTo(ChannelPipeline pipeline) {
        pipeline.addLast("uploads", new Uploads());
        pipeline.addLast(AGGREGATOR, newAggregator());
    }

    private static HttpObjectAggregator newAggregator() {
        // Closing behind an Expect that it refuses: the client may send the body all the same, as RFC 9110 allows.
        HttpObjectAggregator aggregator =
                new HttpObjectAggregator(ConfigManager.getInstance().getMaxRequestSize(), true);
        // Of 8 KiB each. By default it copies all that it has into one piece whenever it has 1024 of them; memory that
        // is free, but not in one piece, is then not enough.
        aggregator.setMaxCumulationBufferComponents(Integer.MAX_VALUE);
        return aggregator;
    }

    @Override
    public void channelRead(ChannelHandlerContext ctx, Object message) {
        boolean last = message instanceof LastHttpContent;
        if (message instanceof HttpRequest) {
            request = (HttpRequest) message;
            unanswered = true;
            refusing = false;
        }
        reading = !last;
        readAtNs = System.nanoTime();
        if (message instanceof HttpContent && !take(((HttpContent) message).content().readableBytes())) {
            refusing = true;
            giveBack();
            forget(ctx);
        }
        if (!refusing) {
            ctx.fireChannelRead(message);
            return;
        }
        ReferenceCountUtil.release(message);
        if (last) {
            refusing = false;
            logger.warn("A body found no room beside {} bytes in flight, of {} at most: 503", TAKEN.get(), MOST);
            answer(ctx, HttpResponseStatus.SERVICE_UNAVAILABLE, NO_ROOM);
        }
    }

    @Override
    public void channelReadComplete(ChannelHandlerContext ctx) {
        if (reading && watch == null) {
            watch(ctx, STALLED_NS);
        }
        ctx.fireChannelReadComplete();
    }

    @Override
    public void write(ChannelHandlerContext ctx, Object message, ChannelPromise promise) {
        if (!Exchanges.isInterim(message) && message instanceof LastHttpContent) {
            giveBack(); // what still comes of its body is thrown away, and not counted
        }
        ctx.write(message, promise);
    }

    @Override
    public void channelInactive(ChannelHandlerContext ctx) {
        reading = false;
        if (watch != null) {
            watch.cancel(false);
        }
        try {
            if (unanswered) {
                ModelQueues.removeAbandoned(); // before their bytes count as given back
            }
        } finally {
            giveBack();
            ctx.fireChannelInactive();
        }
    }

    @Override
    public void userEventTriggered(ChannelHandlerContext ctx, Object event) {
        if (event instanceof HttpExpectationFailedEvent) {
            reading = false; // the client was told not to send the body
        }
        ctx.fireUserEventTriggered(event);
    }

    /** Counts bytes of the request that is being read, unless there is no room for them beside those of others. */
    private boolean take(int bytes) {
        if (bytes == 0 || !unanswered) {
            return true;
        }
        mine += bytes;
        long all = TAKEN.addAndGet(bytes);
        return all <= MOST || mine <= ALWAYS_ROOM_FOR || all == mine;
    }

    /** The request has its answer, or needs none any more. */
    private void giveBack() {
        TAKEN.addAndGet(-mine);
        mine = 0;
        unanswered = false;
    }

    /** Puts a new aggregator in the place of the one that has a part of a body. */
    private void forget(ChannelHandlerContext ctx) {
        ctx.pipeline().replace(AGGREGATOR, AGGREGATOR, newAggregator());
    }

    /** Looks in a while whether more of the body has come. */
    private void watch(ChannelHandlerContext ctx, long delayNs) {
        watch = ctx.executor().schedule(() -> lookAgain(ctx), delayNs, TimeUnit.NANOSECONDS);
    }

    private void lookAgain(ChannelHandlerContext ctx) {
        watch = null;
        if (!reading) {
            return;
        }
        long leftNs = STALLED_NS - (System.nanoTime() - readAtNs);
        if (leftNs > 0) {
            watch(ctx, leftNs);
        } else if (unanswered || refusing) {
            forget(ctx);
            answer(ctx, HttpResponseStatus.REQUEST_TIMEOUT, STALLED);
        } else {
            ctx.close(); // it has its answer
        }
    }

    private void answer(ChannelHandlerContext ctx, HttpResponseStatus status, String document) {
        FullHttpResponse answer = Exchanges.refusal(status, document);
        answer.headers().set(HttpHeaderNames.RETRY_AFTER, RETRY_AFTER_S);
        // As TorchServe does with its own refusals: they are in its metrics and its log of requests, and it closes the
        // connection behind them.
        NettyUtils.requestReceived(ctx.channel(), request);
        NettyUtils.sendHttpResponse(ctx, answer, false);
    }
}
