package org.pytorch.serve;

import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.DecoderException;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.util.Locale;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.workflow.WorkflowException;
import org.pytorch.serve.http.BadRequestException;
import org.pytorch.serve.http.HttpRequestHandlerChain;
import org.pytorch.serve.wlm.WorkerInitializationException;

/**
 * Answers with 400 what the handlers behind it would answer with 500, although nothing is wrong with the server.
 *
 * <p>TorchServe takes forms apart before it looks for the model, and has no word for those that are broken.
 */
final class ClientErrors extends HttpRequestHandlerChain {
    private static final String MULTIPART = HttpHeaderValues.MULTIPART_FORM_DATA.toString();
    private static final String FORM = HttpHeaderValues.APPLICATION_X_WWW_FORM_URLENCODED.toString();
    private static final String NO_PATH = "The request's target is no path; ask for one that begins with a slash.";
    private static final String NO_FORM =
            "The body is no form of the kind that its Content-Type names. Name the type of what you send, such as "
                    + "application/json or image/png; a multipart body needs its boundary, and a name for each field.";

    @Override
    public void handleRequest(
            ChannelHandlerContext ctx, FullHttpRequest req, QueryStringDecoder decoder, String[] segments)
            throws ModelException, DownloadArchiveException, WorkflowException,
                    WorkerInitializationException {
        if (segments.length == 1) {
            throw new BadRequestException(NO_PATH);
        }
        if (!isForm(req)) {
            chain.handleRequest(ctx, req, decoder, segments);
            return;
        }
        try {
            chain.handleRequest(ctx, req, decoder, segments);
        } catch (DecoderException | IndexOutOfBoundsException | NullPointerException broken) {
            throw new BadRequestException(NO_FORM);
        }
    }

    private static boolean isForm(FullHttpRequest req) {
        CharSequence type = HttpUtil.getMimeType(req);
        if (type == null) {
            return false;
        }
        // Not Netty's isMultipart, which throws where the boundary is missing.
        String name = type.toString().toLowerCase(Locale.ROOT);
        return name.startsWith(MULTIPART) || name.equals(FORM);
    }
}
